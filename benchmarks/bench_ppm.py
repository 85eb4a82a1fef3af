"""FusedPPM as a whole against the same module of plain torch layers, eager and compiled."""

from collections.abc import Callable, Sequence

import pytest
import torch
from comparison import DEVICE, Case, Comparison, Results, cases, nbytes
from forward_memory import forward_memory
from stock import StockPPM
from torch import nn

from pspnet_fast import FusedPPM

SHAPES = [(1, 2048, 60, 60), (2, 2048, 60, 60), (1, 2048, 90, 90)]
EVALUATION, TRAINING = "FusedPPM, evaluation: forward", "FusedPPM, training: forward + backward"
# times faster than eager, on a CPU with AVX-512 and on an H200
TARGETS = {EVALUATION: 10.0, TRAINING: 8.0} if DEVICE.type == "cpu" else {EVALUATION: 3.0, TRAINING: 3.0}


def compared(compiled_shapes: Sequence[tuple[int, int, int, int]]) -> pytest.MarkDecorator:
    """Every case in every implementation; torch.compile, which takes up to 20 s a case, at some shapes only."""
    pairs = [
        pytest.param(case, name, id=f"{case} {name}")
        for case in cases(*SHAPES)
        for name in ("eager", "compile", "fused")
        if name != "compile" or case.shape in compiled_shapes
    ]
    return pytest.mark.parametrize(("case", "implementation"), pairs)


@compared(SHAPES)
def test_evaluation(measure: Callable[..., None], device: torch.device, case: Case, implementation: str) -> None:
    module, x = make_module(implementation, case, device).eval(), case.random_map(device)
    output = case.random_map(device, 2 * x.size(1))
    floor = nbytes(x, *module.parameters(), output)
    with torch.no_grad():
        measure(comparison(EVALUATION, case, floor), implementation, lambda: module(x))


@compared(SHAPES[:1])
def test_training(measure: Callable[..., None], device: torch.device, case: Case, implementation: str) -> None:
    """At batch 1 the norm of bin 1, without batch statistics there, is in evaluation mode, in all implementations."""
    module, x = make_module(implementation, case, device), case.random_map(device).requires_grad_()
    grad = case.random_map(device, 2 * x.size(1))
    if case.shape[0] == 1:
        module.get_submodule("features.0.2").eval()

    def forget_gradients() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)

    # x and the output are read or written forward, their gradients backward; weights are read twice, written once
    floor = 2 * nbytes(x, grad) + 3 * nbytes(*module.parameters())
    measure(comparison(TRAINING, case, floor), implementation, lambda: module(x).backward(grad), forget_gradients)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("case", cases((2, 2048, 60, 60)), ids=str)
def test_forward_memory(results: Results, device: torch.device, case: Case, training: bool) -> None:
    output = 2 * nbytes(case.random_map(device))
    results.memory[f"{case} {'training' if training else 'evaluation'}"] = {
        name: forward_memory(kind, case.shape, case.dtype, case.memory_format, device, training) - output
        for name, kind in (("eager", "stock"), ("fused", "fused"))
    }


def make_module(implementation: str, case: Case, device: torch.device) -> nn.Module:
    """FusedPPM, or what it replaces, in training mode."""
    fused = FusedPPM(case.shape[1]).to(device, case.dtype)
    if implementation == "fused":
        return fused
    stock = StockPPM(fused)
    if implementation == "compile":
        stock.compile(fullgraph=True, dynamic=False)
    return stock


def comparison(table: str, case: Case, floor_bytes: int) -> Comparison:
    return Comparison(table, str(case), floor_bytes, TARGETS[table])
