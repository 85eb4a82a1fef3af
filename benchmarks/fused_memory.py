"""Peak memory of what fuse changes in a model of another package, forward and backward, before and after.

PYTHONPATH=. .venv-peers/bin/python benchmarks/fused_memory.py [NAME ...]      a row of a table for each
Each model runs in a process of its own: what the resident set of the process grows by while the fused modules run
forward and backward, one after the other, the largest of them; their inputs are those of a forward of the model.
"""

import argparse
import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from peers import packages

from pspnet_fast import fuse
from pspnet_fast.bench.memory import ENVIRONMENT, growth


def leaves(tree: Any) -> Any:
    """Inputs as a training step of the module alone would have them."""
    if isinstance(tree, Tensor):
        return tree.detach().clone(memory_format=torch.preserve_format).requires_grad_(tree.is_floating_point())
    if isinstance(tree, (list, tuple)):
        return type(tree)(leaves(entry) for entry in tree)
    return {k: leaves(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def measure(name: str, fused: bool, batch: int) -> float:
    """Megabytes."""
    build, size = packages.LARGE[name]
    torch.manual_seed(0)
    model = build().eval()
    example = torch.randn(1, 3, size, size)
    names = fuse(copy.deepcopy(model), example=example, return_report=True)[1].fused
    modules = [model.get_submodule(n) for n in names]
    calls: list[tuple[nn.Module, Any, Any]] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args, kwargs: calls.append((m, args, kwargs)), with_kwargs=True)
        for module in modules
    ]
    with torch.no_grad():
        model(torch.randn(batch, 3, size, size))
    for hook in hooks:
        hook.remove()
    if fused:
        fuse(model, modules=names)
    model.train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    largest = 0
    for module, args, kwargs in calls:
        step = partial(backward, module, leaves(args), leaves(kwargs))
        largest = max(largest, growth(step, torch.device("cpu")))
    return largest / 1e6


def backward(module: nn.Module, args: Any, kwargs: Any) -> None:
    module(*args, **kwargs).sum().backward()


def peaks(name: str, batch: int = 2) -> list[float]:
    """Megabytes of the stock model's and of the fused one's."""
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, __file__, name, "--batch", str(batch), "--only"]
    runs = [
        subprocess.run([*command, which], check=True, env=environment, capture_output=True, text=True)
        for which in ("stock", "fused")
    ]
    return [float(run.stdout) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(packages.LARGE)}; all by default")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--only", choices=["stock", "fused"], help="print the megabytes of one, measured here")
    arguments = parser.parse_args()
    if arguments.only:
        print(measure(arguments.names[0], arguments.only == "fused", arguments.batch))
        return
    print("| model | fused modules, stock / fused MB | ratio |\n|---|---:|---:|")
    for name in arguments.names or packages.LARGE:
        before, after = peaks(name, arguments.batch)
        print(f"| {name} | {before:.0f} / {after:.0f} | {after / before:.2f} |", flush=True)


if __name__ == "__main__":
    main()
