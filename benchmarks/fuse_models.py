"""fuse on models of other packages, before and after: the fused modules, the whole model, a training step.

make test-peers installs the packages; then PYTHONPATH=. .venv-peers/bin/python benchmarks/fuse_models.py [NAME ...].
Random weights, as only time is asked for; the largest relative difference of the logits stands beside it.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from peers import packages

from pspnet_fast import fuse


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


def medians(runs: list[Callable[[], float]], count: int) -> list[float]:
    """Milliseconds of each, in turn, so that a slower minute of the machine is one of all."""
    for run in runs:
        run()
    return [
        statistics.median(times) * 1e3 for times in zip(*([run() for run in runs] for _ in range(count)), strict=True)
    ]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(name: str, dtype: torch.dtype, count: int) -> str:
    build, size = packages.LARGE[name]
    torch.manual_seed(0)
    stock = build().to(dtype).eval()
    image = torch.randn(1, 3, size, size, dtype=dtype)
    ours, report = fuse(copy.deepcopy(stock), return_report=True)
    models = [stock, ours]
    clocks = [Clock(model, report.fused) for model in models]

    def head(i: int) -> float:
        clocks[i].seconds = 0.0
        with torch.no_grad():
            models[i](image)
        return clocks[i].seconds

    def whole(i: int) -> float:
        with torch.no_grad():
            return timed(lambda: models[i](image))

    def step(i: int) -> float:
        return timed(lambda: logits_of(models[i](image)).float().square().mean().backward())

    with torch.no_grad():
        a, b = (logits_of(model(image)).double() for model in models)
    cells = [name, str(dtype).removeprefix("torch."), f"{((a - b).norm() / a.norm()).item():.0e}"]
    for what in (head, whole, step):
        if what is step:
            for model in models:
                model.train()
                for m in model.modules():  # a batch of one: norms of one value a channel keep their statistics
                    if isinstance(m, nn.BatchNorm2d):
                        m.eval()
        before, after = medians([partial(what, i) for i in range(2)], count)
        cells += [f"{before:.0f} / {after:.0f} ms", f"{before / after:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(packages.LARGE)}; all by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs", type=int, default=5, help="of which the median counts")
    arguments = parser.parse_args()
    print(
        "| model | dtype | difference | fused modules, stock / fused | ratio | model | ratio | training step | ratio |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in arguments.names or packages.LARGE:
        print(compare(name, getattr(torch, arguments.dtype), arguments.runs), flush=True)


if __name__ == "__main__":
    main()
