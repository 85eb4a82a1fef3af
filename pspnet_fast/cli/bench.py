"""``pspnet-fast bench``."""

from pathlib import Path
from typing import Any

import click

from pspnet_fast.cli.common import FILE, FOLDER, NEW_FILE

SUITES = ("ops", "head", "upsampled", "loss", "model", "train", "all")


@click.command(short_help="Measure the kernels on this machine, beside plain torch and other runtimes.")
@click.option("--suite", type=click.Choice(SUITES), default="all", show_default=True, help="Which cases.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where; by default a GPU if there is one.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Only the cases of this one.")
@click.option(
    "--case", "pattern", metavar="PATTERN", help="Of all cases those whose title has this regular expression."
)
@click.option("--providers", metavar="NAME[,NAME...]", help="Of ours, eager, compile, max-autotune, ours-compile, "
              "onnxruntime, openvino; each is then tried in every case.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Few cases, few rounds, no memory: a minute or two.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    help="Of each provider in each case, about; on a CPU 0.5, with --quick 0.1.",
)
@click.option(
    "--memory/--no-memory", default=None, help="Also the peak of ours and eager; by default but with --quick."
)
@click.option("--compile-until", type=float, default=360.0, show_default=True, metavar="SECONDS",
              help="Cases that begin later go without torch.compile.")  # fmt: skip
@click.option("--json", "json_path", type=NEW_FILE, help="Write all figures here.")
@click.option("--plot", type=FOLDER, help="Draw speedup, roofline and memory here, as PNG and SVG.")
@click.option("--compare", type=FILE, metavar="OLD.json", help="Tell what got slower; exit code 1 if something did.")
@click.option("--threshold", type=click.FloatRange(min=0), default=10.0, show_default=True, metavar="PERCENT",
              help="With --compare: smaller changes are not told.")  # fmt: skip
@click.option("--from", "source", type=FILE, metavar="NEW.json", help="Measure nothing: use this record.")
@click.option("--list", "only_list", is_flag=True, help="Print the titles of the cases and measure nothing.")
def bench(
    suite: str,
    device: str | None,
    dtype: str | None,
    pattern: str | None,
    providers: str | None,
    quick: bool,
    seconds: float | None,
    memory: bool | None,
    compile_until: float,
    json_path: Path | None,
    plot: Path | None,
    compare: Path | None,
    threshold: float,
    source: Path | None,
    only_list: bool,
) -> None:
    """Measure operators, heads, loss, the whole network and its training step on this machine.

    All providers of a case take turns, so that what else the machine does slows all alike; times are medians. "floor"
    is what the machine's own copy and matrix products, timed in the same run, would take for the bytes and operations
    that the case needs at least. Close other programs first. (docs/benchmarks.md)

    \b
    pspnet-fast bench --quick
    pspnet-fast bench --suite head --case "float32 contiguous" --providers ours,eager,openvino
    pspnet-fast bench --json before.json --plot pictures   # Ctrl-C keeps what is measured
    pspnet-fast bench --compare before.json
    """
    import torch

    from pspnet_fast.bench import record as records
    from pspnet_fast.bench.cases import all_cases, select
    from pspnet_fast.bench.compare import changes
    from pspnet_fast.bench.compare import report as compared
    from pspnet_fast.bench.tables import report

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA GPU here")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    old = records.read(compare) if compare else None
    if source:
        record = records.read(source)
    else:
        cases = select(all_cases(where), suite, dtype, pattern, quick)
        if only_list:
            click.echo("\n".join(f"{case.suite:10}{case}" for case in cases))
            return
        for path in (json_path, plot):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)  # an error before the work, not after it
        record = _measured(where, cases, providers, quick, seconds, memory, compile_until)
    click.echo(report(record))
    if json_path:
        records.write(record, json_path)
        click.echo(f"\nwrote {json_path}")
    if plot:
        from pspnet_fast.bench.plots import draw

        click.echo("\nwrote " + ", ".join(map(str, draw(record, plot))))
    if old:
        found = changes(old, record)
        click.echo(f"\nAgainst {compare}, each divided by the machine's own rate beside it:\n")
        click.echo(compared(found, 1 + threshold / 100))
        if any(change.verdict(1 + threshold / 100) == "slower" for change in found):
            raise SystemExit(1)


def _measured(
    device: Any,
    cases: Any,
    providers: str | None,
    quick: bool,
    seconds: float | None,
    memory: bool | None,
    until: float,
) -> dict[str, Any]:
    from tqdm import tqdm

    from pspnet_fast.bench.providers import chosen_providers
    from pspnet_fast.bench.runner import Options, Run

    chosen, missing = chosen_providers(providers, device)
    if quick and providers is None:
        chosen = [provider for provider in chosen if provider.name in ("ours", "eager")]
        missing = {}
    for name, reason in missing.items():
        click.echo(f"without {name}: {reason}", err=True)
    default = 0.15 if device.type == "cuda" else 0.5
    options = Options(
        seconds=(default / 5 if quick else default) if seconds is None else seconds,
        most=100 if device.type == "cuda" else 50,
        memory=not quick if memory is None else memory,
        compile_until=until,
    )
    run = Run(device, chosen, missing, providers is not None, options)
    with tqdm(cases, unit="case", leave=False) as bar:
        try:
            for case in bar:
                run.measure(case, lambda what, case=case: bar.set_postfix_str(f"{case}, {what}"))  # type: ignore[misc]
        except KeyboardInterrupt:
            click.echo(f"\ninterrupted: {bar.n} of {len(cases)} cases are measured, and kept", err=True)
            if not bar.n:
                raise
    return run.record()
