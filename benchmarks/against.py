"""Two builds of the package, or plain torch and this one, on a CPU: the cases of `pspnet_fast.bench` in turns.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/against.py FOLDER|eager [--case REGEX] [--seconds S]

FOLDER holds the other build's pspnet_fast, compiled, with the same cases: a checkout, or a copy made before a change.
Each side runs in a process of its own, call by call in turns. With one thread a time is the thread's processor time,
which bears a busy machine, else it is the host's; of all calls the tenth quantile, in milliseconds. "copy" is the time
of a copy that reads and writes as many bytes as the case has to, in the same turns.
PSPNET_FAST_ISA and ATEN_CPU_CAPABILITY choose the instruction sets of this package and of plain torch.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def serve(pattern: str | None, threads: int, ours: bool) -> None:
    """One side: prints a case's name, then the times of it and of a copy for each line it reads, until that says to
    go on."""
    import torch

    from pspnet_fast.bench.cases import all_cases, select

    torch.set_num_threads(threads)
    device, clock = torch.device("cpu"), time.thread_time if threads == 1 else time.perf_counter
    for case in select(all_cases(device), pattern=pattern):
        step = case.make(device, ours, lambda function: function)
        source = torch.ones(max(step.floor_bytes // 2, 1), dtype=torch.uint8)
        target = torch.ones_like(source)
        print(case, flush=True)
        while sys.stdin.readline() == "again\n":
            step.setup()
            start = clock()
            step.call()
            end = clock()
            target.copy_(source)
            print(end - start, clock() - end, flush=True)
    print(flush=True)


def tenth(times: list[float]) -> float:
    return 1e3 * statistics.quantiles(times, n=10, method="inclusive")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the other build; or eager")
    parser.add_argument("--case", metavar="REGEX", help="cases whose 'table: name' match; the standard ones by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring one case (default: 1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", choices=("other", "this"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    eager = options.folder == Path("eager")
    if options.serve:
        return serve(options.case, options.threads, ours=options.serve == "this" or not eager)
    if not eager and not any((options.folder / "pspnet_fast").glob("_C*.so")):
        parser.error(f"folder must hold a compiled pspnet_fast, but {options.folder} does not")
    children = []
    for side, folder in (("other", ROOT if eager else options.folder), ("this", ROOT)):
        environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", side]
        child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)

    def ask(child: "subprocess.Popen[str]", text: str) -> str:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(text)
        child.stdin.flush()
        return child.stdout.readline().strip()

    other = "eager" if eager else "other"
    print(f"{other} ms, this ms, copy ms, {other} / this, case")
    titles = [child.stdout.readline().strip() for child in children]  # type: ignore[union-attr]
    while all(titles):
        if titles[0] != titles[1]:
            sys.exit(f"the builds have other cases: {titles[0]!r} and {titles[1]!r}")
        times: tuple[list[float], list[float], list[float]] = ([], [], [])  # of the other, of this, of the copy
        start = time.monotonic()
        while time.monotonic() - start < options.seconds or len(times[0]) < 5:
            for child, values in zip(children, times, strict=False):
                seconds, copy = ask(child, "again\n").split()
                values.append(float(seconds))
            times[2].append(float(copy))
        before, after, copied = (tenth(values[1:]) for values in times)
        print(f"{before:9.3f} {after:9.3f} {copied:9.3f} {before / after:6.2f}  {titles[0]}", flush=True)
        titles = [ask(child, "next\n") for child in children]
    return None


if __name__ == "__main__":
    main()
