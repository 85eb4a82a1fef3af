"""confusion_matrix on label maps of regions, against torch.bincount on the pixels that count."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from comparison import Comparison, nbytes

from pspnet_fast import ops, reference


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("classes", [19, 150])
def test_confusion_matrix(
    measure: Callable[..., None], device: torch.device, classes: int, implementation: str
) -> None:
    regions = torch.randint(0, classes, (2, 1, 40, 40), device=device).float()
    target = F.interpolate(regions, (473, 473)).squeeze(1).long()
    target[:, ::20] = 255
    prediction = torch.where(torch.rand(target.shape, device=device) < 0.9, target, target.roll(1)).clamp(
        max=classes - 1
    )
    prediction = prediction.to(torch.uint8)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    module = reference if implementation == "eager" else ops
    against = Comparison("confusion_matrix", f"2x473x473, {classes} classes", floor_bytes=nbytes(prediction, target))
    measure(against, implementation, lambda: module.confusion_matrix(prediction, target, classes, out=counts))
