"""upsample_argmax, with and without confidence, against interpolation, softmax and maximum."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import Case, Comparison, cases, chosen, nbytes

from pspnet_fast import ops

SIZE = (473, 473)


@pytest.mark.parametrize("implementation", ["eager", "compile", "fused"])
@pytest.mark.parametrize("confidence", [False, True], ids=["classes", "confidence"])
@pytest.mark.parametrize("case", cases((2, 150, 60, 60), (2, 19, 60, 60)), ids=str)
def test_upsample_argmax(
    measure: Callable[..., None], device: torch.device, case: Case, confidence: bool, implementation: str
) -> None:
    logits = case.random_map(device)

    def eager() -> object:
        values = F.interpolate(logits.float(), SIZE, mode="bilinear", align_corners=True)
        return values.softmax(1).max(1) if confidence else values.argmax(1)

    def fused() -> object:
        return ops.upsample_argmax(logits, SIZE, align_corners=True, return_confidence=confidence)

    written = case.shape[0] * SIZE[0] * SIZE[1] * (5 if confidence else 1)
    name = "with confidence" if confidence else "classes"
    against = Comparison("upsample_argmax to 473x473", f"{case} {name}", nbytes(logits) + written, target=10)
    function = chosen(implementation, eager, fused)
    with torch.no_grad():
        measure(against, implementation, function)
