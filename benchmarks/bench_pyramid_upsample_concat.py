"""pyramid_upsample_concat_ into the context half of a concatenation, against interpolation and torch.cat."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import IMPLEMENTATIONS, Case, Comparison, cases, chosen, nbytes
from torch import Tensor

from pspnet_fast import ops

BINS = (1, 2, 3, 6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", cases((1, 2048, 60, 60)), ids=str)
def test_pyramid_upsample_concat(
    measure: Callable[..., None], device: torch.device, case: Case, direction: str, implementation: str
) -> None:
    n, channels, h, w = case.shape
    r = channels // len(BINS)
    concat = case.random_map(device, 2 * channels)
    reduced = torch.randn(n, 50, r, dtype=case.dtype, device=device)
    maps = [z.mT.reshape(n, r, b, b) for b, z in zip(BINS, reduced.split([b * b for b in BINS], 1), strict=True)]
    maps = [z.contiguous(memory_format=case.memory_format) for z in maps]

    def fused() -> Tensor:
        return ops.pyramid_upsample_concat_(concat, reduced, BINS, offset=channels)

    def eager() -> Tensor:
        return torch.cat([F.interpolate(z, (h, w), mode="bilinear", align_corners=True) for z in maps], 1)

    function = chosen(implementation, eager, fused)
    inputs = [reduced] if implementation == "fused" else maps
    against = Comparison("pyramid_upsample_concat_", f"{case} {direction}", floor_bytes=nbytes(concat) // 2)
    if direction == "forward":
        with torch.no_grad():
            measure(against, implementation, function)
        return
    for leaf in inputs:
        leaf.requires_grad_()
    output = function()
    grad = case.random_map(device, output.size(1))
    measure(against, implementation, lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True))
