"""Every operator and module of the benchmarks against eager on a CPU, in processor time: for machines that are busy.

    OMP_NUM_THREADS=1 python benchmarks/cpu_ratios.py [--only REGEX] [--seconds S] [--below RATIO]
    OMP_NUM_THREADS=1 python benchmarks/cpu_ratios.py --small
    OMP_NUM_THREADS=1 PSPNET_FAST_ISA=baseline ATEN_CPU_CAPABILITY=default python benchmarks/cpu_ratios.py

The cases are those of bench_*.py; with --small, modules, loss and argmax on a map of 16x16 pixels and 64 channels,
where the host's time counts. Both implementations take turns on one thread; a time is the tenth quantile of the
thread's processor time in milliseconds, a ratio is of one run. --against FOLDER holds another build's kernels (a folder
with a pspnet_fast of the same operators) against these, likewise in turns, each in a process of its own.
"""

import argparse
import importlib
import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
OPERATORS = [
    "ppm",
    "pyramid_batch_norm",
    "pyramid_context",
    "pyramid_pool",
    "pyramid_reduce",
    "pyramid_split_weight",
    "pyramid_upsample_concat",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_softmax_accumulate",
    "confusion_matrix",
]
SKIPPED = ("test_forward_memory",)
Timed = Callable[[], float]


def parametrizations(function: Any) -> Iterator[dict[str, Any]]:
    """The keyword arguments of each of a benchmark's cases."""
    axes = []
    for mark in function.pytestmark:
        names, values = mark.args[:2]
        names = [names] if isinstance(names, str) and "," not in names else names
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",")]
        rows = [getattr(value, "values", value) if len(names) > 1 else (value,) for value in values]
        axes.append([dict(zip(names, row, strict=True)) for row in rows])
    for row in itertools.product(*axes):
        yield {name: value for part in row for name, value in part.items()}


def timed_cases(only: str) -> Iterator[tuple[str, dict[str, Timed]]]:
    """(name, implementation -> processor seconds of one call) of the cases whose names match."""
    import torch

    for operator in OPERATORS:
        module = importlib.import_module(f"bench_{operator}")
        for name, function in list(vars(module).items()):
            if not name.startswith("test_") or name in SKIPPED:
                continue
            groups: dict[str, list[dict[str, Any]]] = {}
            for row in parametrizations(function):
                if row["implementation"] in ("eager", "fused"):
                    rest = {key: value for key, value in row.items() if key != "implementation"}
                    groups.setdefault(f"{operator} {name[5:]} " + " ".join(map(short, rest.values())), []).append(row)
            for title, rows in groups.items():
                if not re.search(only, title):
                    continue
                found: dict[str, Timed] = {}
                for row in rows:
                    record = recorder(found)
                    function(measure=record, device=torch.device("cpu"), **row)
                yield title, found
                found.clear()


def small_cases(only: str) -> Iterator[tuple[str, dict[str, Timed]]]:
    """The same of modules and operators on (1, 64, 16, 16), 19 classes, 128x128 pixels."""
    import torch
    import torch.nn.functional as F
    from bench_head import make_head
    from bench_ppm import make_module
    from comparison import Case
    from torch import Tensor, nn

    from pspnet_fast import ops

    case, cpu, size = Case((1, 64, 16, 16), torch.float32, torch.contiguous_format), torch.device("cpu"), (128, 128)
    logits, target = torch.randn(1, 19, 16, 16), torch.randint(0, 19, (1, *size))

    def upsampled(z: Tensor) -> Tensor:
        return F.interpolate(z, size, mode="bilinear", align_corners=True)

    def of_module(make: Callable[..., nn.Module], name: str, training: bool) -> Callable[[], object]:
        module, x = make(name, case, cpu).train(training), case.random_map(cpu).requires_grad_(training)
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()  # a level of one value a channel has no statistics
        return (lambda: module(x).sum().backward()) if training else (lambda: module(x))

    def loss(function: Callable[..., Tensor]) -> Callable[[], object]:
        z = logits.clone().requires_grad_()
        return lambda: torch.autograd.grad(function(z, target), z)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object], bool]] = {
        "upsample_argmax": (
            lambda: upsampled(logits).argmax(1),
            lambda: ops.upsample_argmax(logits, size, align_corners=True),
            False,
        ),
        "upsample_cross_entropy, forward + backward": (
            loss(lambda z, t: F.cross_entropy(upsampled(z), t)),
            loss(ops.upsample_cross_entropy),
            True,
        ),
    }
    for title, make in (("FusedPPM", make_module), ("FusedPSPHead", make_head)):
        for mode, training in (("evaluation", False), ("forward + backward", True)):
            eager, fused = (of_module(make, name, training) for name in ("eager", "fused"))
            pairs[f"{title}, {mode}"] = eager, fused, training
    for title, (eager, fused, grad) in pairs.items():
        found: dict[str, Timed] = {}
        with torch.set_grad_enabled(grad):
            recorder(found)(None, "eager", eager)
            recorder(found)(None, "fused", fused)
        if re.search(only, title):
            yield title, found


def short(value: Any) -> str:
    return str(value).removeprefix("torch.")


def recorder(found: dict[str, Timed]) -> Callable[..., None]:
    """The fixture `measure`, which keeps what it is to measure."""
    import torch

    def measure(
        comparison: Any, implementation: str, function: Callable[[], object], setup: Callable[[], None] = lambda: None
    ) -> None:
        grad = torch.is_grad_enabled()

        def timed() -> float:
            with torch.set_grad_enabled(grad):
                setup()
                start = time.thread_time()
                function()
                return time.thread_time() - start

        found[implementation] = timed

    return measure


def tenth(times: list[float]) -> float:
    return 1e3 * (statistics.quantiles(times, n=10, method="inclusive")[0] if len(times) > 1 else times[0])


def in_turns(implementations: dict[str, Timed], seconds: float) -> dict[str, float]:
    """Milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for timed in implementations.values():
        timed()
    start = time.monotonic()
    while time.monotonic() - start < seconds or len(times["fused"]) < 3:
        for name, timed in implementations.items():
            times[name].append(timed())
    return {name: tenth(values) for name, values in times.items()}


def serve(only: str) -> None:
    """A child of --against: the fused implementation of each case, one call a line."""
    for title, implementations in timed_cases(only):
        print(title, flush=True)
        while sys.stdin.readline() == "again\n":
            print(implementations["fused"](), flush=True)
    print(flush=True)


def against(other: str, only: str, seconds: float) -> None:
    """Prints the times of two builds."""
    children = []
    for folder in (other, str(FOLDER.parent)):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])}
        command = [sys.executable, __file__, "--serve", "--only", only]
        child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)

    def ask(child: Any, text: str) -> str:
        child.stdin.write(text)
        child.stdin.flush()
        return child.stdout.readline().strip()

    titles = [child.stdout.readline().strip() for child in children]
    while titles[0]:
        times: list[list[float]] = [[], []]
        start = time.monotonic()
        while time.monotonic() - start < seconds or len(times[0]) < 4:
            for child, values in zip(children, times, strict=True):
                values.append(float(ask(child, "again\n")))
        before, after = (tenth(values[1:]) for values in times)
        print(f"{before:9.3f} {after:9.3f} {before / after:6.2f}  {titles[0]}", flush=True)
        titles = [ask(child, "next\n") for child in children]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names match (default: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring one case (default: 1)")
    parser.add_argument("--below", type=float, metavar="RATIO", help="print only what is less times as fast as eager")
    parser.add_argument("--small", action="store_true", help="a map so small that the host's time counts")
    parser.add_argument("--against", metavar="FOLDER", help="compare with another build instead of eager")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path += [str(FOLDER), str(FOLDER.parent / "tests")]
    if options.against:
        return against(options.against, options.only, options.seconds)
    import torch

    torch.set_num_threads(1)
    if options.serve:
        return serve(options.only)
    print(f"{torch.backends.cpu.get_cpu_capability()} in torch", "eager ms, fused ms, eager / fused, case", sep="\n")
    for title, implementations in (small_cases if options.small else timed_cases)(options.only):
        times = in_turns(implementations, options.seconds)
        ratio = times["eager"] / times["fused"]
        if options.below is None or ratio < options.below:
            print(f"{times['eager']:9.3f} {times['fused']:9.3f} {ratio:6.2f}  {title}", flush=True)
    return None


if __name__ == "__main__":
    main()
