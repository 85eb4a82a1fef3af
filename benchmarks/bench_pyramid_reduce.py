"""pyramid_reduce against its reference: forward as inference runs it, with norm and ReLU, and backward."""

from collections.abc import Callable

import pytest
import torch
from comparison import IMPLEMENTATIONS, Comparison, chosen, nbytes

from pspnet_fast import ops, reference

BINS, CHANNELS, REDUCED = (1, 2, 3, 6), 2048, 512


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 2])
def test_pyramid_reduce(
    measure: Callable[..., None],
    device: torch.device,
    batch: int,
    dtype: torch.dtype,
    direction: str,
    implementation: str,
) -> None:
    eager = reference.pyramid_reduce
    op = chosen(implementation, eager, ops.pyramid_reduce)
    factory = {"dtype": dtype, "device": device}
    pooled = torch.randn(batch, 50, CHANNELS, **factory)
    weights = [torch.randn(REDUCED, CHANNELS, **factory) for _ in BINS]
    case = f"batch {batch} {str(dtype).removeprefix('torch.')} {direction}"
    # forward one matrix product, backward two
    bytes, operations = nbytes(*weights), 2 * pooled.numel() * REDUCED
    if direction == "forward":
        against = Comparison("pyramid_reduce", case, bytes, operations=operations, dtype=dtype)
        norm = [(*torch.rand(4, REDUCED, **factory), 1e-5) for _ in BINS]
        with torch.no_grad():
            measure(against, implementation, lambda: op(pooled, weights, BINS, norm=norm, relu=True))
        return
    against = Comparison("pyramid_reduce", case, 2 * bytes, operations=2 * operations, dtype=dtype)
    inputs = [t.requires_grad_() for t in (pooled, *weights)]
    reduced = op(pooled, weights, BINS)
    grad = torch.randn_like(reduced)
    measure(against, implementation, lambda: torch.autograd.grad(reduced, inputs, grad, retain_graph=True))
