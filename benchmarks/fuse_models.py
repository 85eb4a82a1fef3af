"""fuse on models of other packages, before and after: the fused modules, the whole model, a training step, memory.

make test-peers installs the packages; then PYTHONPATH=. .venv-peers/bin/python benchmarks/fuse_models.py [NAME ...].
Random weights, as only time is asked for; the relative difference of the logits stands beside it.
"""

import argparse
import copy
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fused_memory import peaks
from peers import packages

from pspnet_fast import fuse

PAGE = Path(__file__).parents[1] / "docs" / "fuse.md"
PART = re.compile(r"(?<=<!-- of benchmarks/fuse_models.py -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEADER = ("model", "dtype", "difference", "fused modules, stock / fused", "", "whole model", "", "training step", "")


def logits_of(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


class Clock:
    """The time that some modules of a model take in a forward, those within others not twice."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.seconds, self.depth, self.start = 0.0, 0, 0.0
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self.enter)
            model.get_submodule(name).register_forward_hook(self.leave)

    def enter(self, *_: object) -> None:
        self.depth += 1
        if self.depth == 1:
            self.start = time.perf_counter()

    def leave(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.seconds += time.perf_counter() - self.start


def ratios(run: Callable[[int], Sequence[float]], count: int) -> list[str]:
    """Medians of both models' times and their ratio, in turn, so that a slower minute of the machine is one of both."""
    run(0), run(1)
    times = [(run(0), run(1)) for _ in range(count)]
    cells = []
    for pairs in zip(*(zip(stock, ours, strict=True) for stock, ours in times), strict=True):
        before, after = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        cells += [f"{before:.0f} / {after:.0f} ms", f"{before / after:.2f}x"]
    return cells


def compare(name: str, dtype: torch.dtype, count: int) -> list[str]:
    """A row of the table."""
    build, size = packages.LARGE[name]
    torch.manual_seed(0)
    stock = build().to(dtype).eval()
    image = torch.randn(1, 3, size, size, dtype=dtype)
    ours, report = fuse(copy.deepcopy(stock), example=image, return_report=True)
    models = [stock, ours]
    clocks = [Clock(model, report.fused) for model in models]

    def forward(i: int) -> tuple[float, float]:
        """Seconds of the fused modules, and of the whole."""
        clocks[i].seconds, start = 0.0, time.perf_counter()
        with torch.no_grad():
            models[i](image)
        return clocks[i].seconds, time.perf_counter() - start

    def step(i: int) -> tuple[float]:
        start = time.perf_counter()
        logits_of(models[i](image)).float().square().mean().backward()
        return (time.perf_counter() - start,)

    with torch.no_grad():
        a, b = (logits_of(model(image)).double() for model in models)
    cells = [name, str(dtype).removeprefix("torch."), f"{((a - b).norm() / a.norm()).item():.0e}"]
    cells += ratios(forward, count)
    for model in models:
        model.train()
        for m in model.modules():  # a batch of one: norms of one value a channel keep their statistics
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    cells += ratios(step, count)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(packages.LARGE)}; all by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs", type=int, default=5, help="of which the median counts")
    parser.add_argument("--memory", action="store_true", help="the fused modules' peak, too, forward and backward")
    parser.add_argument(
        "--readme", action="store_true", help="with --memory; writes the table into docs/fuse.md as well"
    )
    arguments = parser.parse_args()
    with_memory = arguments.memory or arguments.readme
    header = [*HEADER, "memory", ""] if with_memory else HEADER
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    print(*lines, sep="\n", flush=True)
    for name in arguments.names or packages.LARGE:
        cells = compare(name, getattr(torch, arguments.dtype), arguments.runs)
        if with_memory:
            before, after = peaks(name)
            cells += [f"{before:.0f} / {after:.0f} MB", f"{after / before:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.readme:
        text, count = PART.subn(lambda _: "\n".join(lines) + "\n", PAGE.read_text(encoding="utf-8"))
        if count != 1:
            parser.error(f"{PAGE} has not the two comments that the table goes between")
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
