"""pyramid_pool, with the copy into the concatenation that FusedPPM asks of it, against its reference and a copy."""

from collections.abc import Callable

import pytest
import torch
from comparison import IMPLEMENTATIONS, Case, Comparison, cases, chosen, nbytes
from torch import Tensor

from pspnet_fast import ops, reference

BINS = (1, 2, 3, 6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", cases((1, 2048, 60, 60)), ids=str)
def test_pyramid_pool(
    measure: Callable[..., None], device: torch.device, case: Case, direction: str, implementation: str
) -> None:
    x, concat = case.random_map(device), case.random_map(device, 2 * case.shape[1])

    def fused() -> tuple[Tensor, Tensor]:
        return ops.pyramid_pool(x, BINS, concat=concat), concat

    def eager() -> tuple[Tensor, Tensor]:
        return reference.pyramid_pool(x, BINS), x.clone()

    function = chosen(implementation, eager, fused)
    against = Comparison("pyramid_pool", f"{case} {direction}", floor_bytes=2 * nbytes(x))
    if direction == "forward":
        with torch.no_grad():
            measure(against, implementation, function)
        return
    x.requires_grad_()
    outputs = function()
    grads = [case.random_map(device, t.size(1)) if t.dim() == 4 else torch.randn_like(t) for t in outputs]
    measure(against, implementation, lambda: torch.autograd.grad(outputs, x, grads, retain_graph=True))
