"""pyramid_context_, with the norm and ReLU that evaluation asks of it, against its reference."""

from collections.abc import Callable

import pytest
import torch
from comparison import Case, Comparison, cases, nbytes

from pspnet_fast import ops, reference

BINS = (1, 2, 3, 6)


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", cases((1, 512, 60, 60), (1, 512, 90, 90)), ids=str)
def test_pyramid_context(
    measure: Callable[..., None], device: torch.device, case: Case, direction: str, implementation: str
) -> None:
    op = (ops if implementation == "fused" else reference).pyramid_context_
    conv, taps = case.random_map(device), torch.randn(case.shape[0], 50, 9, 512, dtype=case.dtype, device=device)
    if direction == "forward":
        against = Comparison("pyramid_context_", f"{case} forward", floor_bytes=2 * nbytes(conv))
        norm = (*torch.rand(4, 512, dtype=case.dtype, device=device), 1e-5)
        with torch.no_grad():
            measure(against, implementation, lambda: op(conv, taps, BINS, 3, norm=norm, relu=True))
        return
    against = Comparison("pyramid_context_", f"{case} backward", floor_bytes=nbytes(conv))
    taps.requires_grad_()
    output, grad = op(conv, taps, BINS, 3), case.random_map(device)
    measure(against, implementation, lambda: torch.autograd.grad(output, taps, grad, retain_graph=True))
