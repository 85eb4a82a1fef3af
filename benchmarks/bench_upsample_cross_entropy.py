"""upsample_cross_entropy, forward and with backward, against interpolation and cross entropy."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import DEVICE, Case, Comparison, cases, chosen, nbytes
from torch import Tensor

from pspnet_fast import ops

SIZE = (473, 473)
TARGETS = {150: 10, 19: 6} if DEVICE.type == "cpu" else {150: 8, 19: None}


@pytest.mark.parametrize("implementation", ["eager", "compile", "fused"])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", cases((2, 150, 60, 60), (2, 19, 60, 60)), ids=str)
def test_upsample_cross_entropy(
    measure: Callable[..., None], device: torch.device, case: Case, direction: str, implementation: str
) -> None:
    logits = case.random_map(device).requires_grad_(direction != "forward")
    n, k = case.shape[:2]
    target = torch.randint(0, k, (n, *SIZE), device=device)
    target[torch.rand(target.shape, device=device) < 0.05] = 255

    def eager(logits: Tensor) -> Tensor:
        values = F.interpolate(logits.float(), SIZE, mode="bilinear", align_corners=True)
        return F.cross_entropy(values, target, ignore_index=255)

    def fused(logits: Tensor) -> Tensor:
        return ops.upsample_cross_entropy(logits, target)

    loss = chosen(implementation, eager, fused)

    def step() -> object:
        return loss(logits) if direction == "forward" else torch.autograd.grad(loss(logits), logits)

    moved = nbytes(logits) + nbytes(target) + n * SIZE[0] * SIZE[1] * 4  # and the log-sum-exp
    if direction != "forward":
        moved = 2 * moved + nbytes(logits)
    target_ratio = None if direction == "forward" else TARGETS[k]
    against = Comparison("upsample_cross_entropy at 473x473", f"{case} {direction}", moved, target_ratio)
    measure(against, implementation, step)
