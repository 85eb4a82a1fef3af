"""Operator calls and host time of FusedPPM and FusedPSPHead on tiny maps, beside the same of plain torch layers.

    python benchmarks/operator_calls.py [--device cuda] [--calls]

A call is one that torch dispatches to a device: neither a view nor an allocation, which launch nothing. Host times are
of maps so small that nothing else counts, medians in microseconds of rounds in which both take turns: on a CPU the
thread's processor time, which other work on the machine hardly touches, on a GPU the time until all is queued.
"""

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pspnet_fast.head
from pspnet_fast import FusedPPM, FusedPSPHead
from pspnet_fast.bench.stock import StockPPM

CHANNELS, OUTPUTS, SIZE = 32, 8, 8  # 8 channels a level: one vector
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "new_concat")


def never(*_: Any) -> bool:
    """The head's choice of the plain form for tiny maps is left out: they stand for large ones."""
    return False


class Calls(TorchDispatchMode):
    """Counts the operators that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if not (func.is_view or name.lstrip("_") in (*ALLOCATIONS, "detach", "alias", "unsafe_view")):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def modules(device: torch.device) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, stock, fused)."""
    ppm = FusedPPM(CHANNELS).to(device)
    yield "FusedPPM", StockPPM(ppm), ppm
    ppm = FusedPPM(CHANNELS)
    layers = nn.Conv2d(ppm.out_channels, OUTPUTS, 3, padding=1, bias=False), nn.BatchNorm2d(OUTPUTS), nn.ReLU()
    head = FusedPSPHead(ppm, *layers).to(device)
    yield "FusedPSPHead", nn.Sequential(StockPPM(ppm), *layers), head


def step(module: nn.Module, x: Tensor, autocast: bool) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """Forward, and the backward of its result."""

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            return module(x)

    def backward(y: Tensor) -> None:
        for tensor in (x, *module.parameters()):
            tensor.grad = None
        y.backward(torch.ones_like(y))

    return forward, backward


def counted(function: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    function()
    with Calls() as calls:
        result = function()
    return result, calls.names


def calls_of(module: nn.Module, x: Tensor, training: bool, autocast: bool) -> list[Counter[str]]:
    """Of the forward pass and, in training, of the backward pass."""
    module.train(training)
    x = x.detach().requires_grad_(training)
    forward, _ = step(module, x, autocast)
    with torch.set_grad_enabled(training):
        y, calls = counted(forward)
    if not training:
        return [calls]
    grad = torch.ones_like(y)
    y.backward(grad)  # gradients exist before nothing is counted
    for tensor in (x, *module.parameters()):
        tensor.grad = None
    y = forward()
    with Calls() as mode:
        y.backward(grad)
    return [calls, mode.names]


def host_times(stock: nn.Module, fused: nn.Module, x: Tensor, training: bool, autocast: bool) -> list[list[float]]:
    """Microseconds of (forward, backward) for each of the two: medians, in turns."""
    x = x.detach().requires_grad_(training)
    steps = [step(module.train(training), x, autocast) for module in (stock, fused)]
    times: list[list[list[float]]] = [[[], []], [[], []]]
    clock = time.perf_counter if x.is_cuda else time.thread_time
    gc.collect()
    gc.disable()
    with torch.set_grad_enabled(training):
        for _ in range(ROUNDS):
            for (forward, backward), (first, second) in zip(steps, times, strict=True):
                start = clock()
                y = forward()
                middle = clock()
                first.append(middle - start)
                if training:
                    backward(y)
                    second.append(clock() - middle)
                if x.is_cuda:
                    torch.cuda.synchronize()
    gc.enable()
    return [[statistics.median(part) * 1e6 for part in pair if part] for pair in times]


ROUNDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--batch", type=int, default=2, help="N of the maps (default: 2)")
    parser.add_argument("--calls", action="store_true", help="list the calls by name as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    x = torch.randn(options.batch, CHANNELS, SIZE, SIZE, device=device)
    print("| module | mode | stock calls | fused calls | stock us | fused us | stock / fused |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with mock.patch.object(pspnet_fast.head, "concatenation_is_cheaper", never):
        for name, stock, fused in modules(device):
            for mode, training, autocast in (
                ("evaluation", False, False),
                ("evaluation, autocast", False, True),
                ("training", True, False),
                ("training, autocast", True, True),
            ):
                calls = [calls_of(m, x, training, autocast) for m in (stock, fused)]
                times = host_times(stock, fused, x, training, autocast)
                cells = [" / ".join(str(c.total()) for c in part) for part in calls]
                cells += [" / ".join(f"{t:.0f}" for t in part) for part in times]
                cells += [" / ".join(f"{a / b:.2f}" for a, b in zip(*times, strict=True))]
                print("|", " | ".join((name, mode, *cells)), "|", flush=True)
                if options.calls:
                    for part in calls[1]:
                        print("  ", dict(part))


if __name__ == "__main__":
    main()
