"""upsample_cross_entropy, against interpolation and cross entropy."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pspnet_fast import ops
from pspnet_fast.bench.cases import SMALL_LOGITS, Case, Compiler, Map, Step, maps, nbytes, upsampled_size
from pspnet_fast.bench.stock import upsampled_cross_entropy

TARGETS: dict[str, dict[int, float | None]] = {"cpu": {150: 10, 19: 6}, "cuda": {150: 8, 19: None}}


def cases(device: torch.device) -> Iterator[Case]:
    """All of this suite on a device."""
    for map in maps(device, (2, 150, 60, 60), (2, 19, 60, 60), SMALL_LOGITS):
        size, small = upsampled_size(map), map.small
        table = f"upsample_cross_entropy at {size[0]}x{size[1]}"
        for direction in ("forward", "forward + backward"):
            both = direction != "forward"
            classes = map.shape[1]
            yield Case(
                "loss", "upsample_cross_entropy", table, f"{map} {direction}", map.dtype,
                partial(_cross_entropy, map, size, both),
                TARGETS[device.type][classes] if both and not small else None,
                standard=map.usual and (both or map.first) and not small,
                quick=map.first and both and classes == 19 and not small,
                compiles=map.first and both and classes == 150,
            )  # fmt: skip


def _cross_entropy(
    map: Map, size: tuple[int, int], backward: bool, device: torch.device, ours: bool, compiler: Compiler[Any]
) -> Step:
    """A class and pixel is two operations of interpolating, an exponential and an addition; six more backward."""
    logits = map.random(device).requires_grad_(backward)
    n, k = map.shape[:2]
    target = torch.randint(0, k, (n, *size), device=device)
    target[torch.rand(target.shape, device=device) < 0.05] = 255

    def fused(logits: Tensor, target: Tensor) -> Tensor:
        return ops.upsample_cross_entropy(logits, target)

    loss = compiler(fused if ours else upsampled_cross_entropy)

    def step() -> object:
        return torch.autograd.grad(loss(logits, target), logits) if backward else loss(logits, target)

    pixels = n * size[0] * size[1]
    moved = nbytes(logits) + nbytes(target) + pixels * 4  # and the log-sum-exp
    if backward:
        moved = 2 * moved + nbytes(logits)
    return Step(step, moved, (10 if backward else 4) * pixels * k)
