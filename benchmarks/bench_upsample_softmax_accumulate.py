"""upsample_softmax_accumulate_ into a whole map, against interpolation, softmax, mirroring and addition."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import Case, Comparison, cases, chosen, nbytes

from pspnet_fast import ops

SIZE = (473, 473)


@pytest.mark.parametrize("implementation", ["eager", "compile", "fused"])
@pytest.mark.parametrize("case", cases((2, 150, 60, 60), (2, 19, 60, 60)), ids=str)
def test_upsample_softmax_accumulate(
    measure: Callable[..., None], device: torch.device, case: Case, implementation: str
) -> None:
    logits = case.random_map(device)
    n, k = case.shape[:2]
    probabilities = torch.zeros(n, k, *SIZE, device=device).contiguous(memory_format=case.memory_format)

    def eager() -> object:
        p = F.interpolate(logits.float(), SIZE, mode="bilinear", align_corners=True).softmax(1)
        return probabilities.add_(p.flip(3), alpha=0.5)

    def fused() -> object:
        return ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True, mirrored=True, weight=0.5)

    floor = nbytes(logits) + 2 * nbytes(probabilities)
    against = Comparison("upsample_softmax_accumulate_ to 473x473, mirrored", str(case), floor)
    function = chosen(implementation, eager, fused)
    with torch.no_grad():
        measure(against, implementation, function)
