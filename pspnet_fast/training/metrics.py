"""Intersection over union and accuracies from the int64 counts of ops.confusion_matrix."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Scores of a confusion matrix (K, K) int64, row = label, column = prediction.

    A class that neither labels nor predictions hold has no IoU (NaN) and is skipped in the mean, as in mmseg; semseg
    counts it as 0. A class that is only predicted has IoU 0. Likewise a class without a labelled pixel has no accuracy.
    """

    confusion: Tensor

    @property
    def iou(self) -> Tensor:
        """(K,) float64: intersection over union of each class."""
        hits = self.confusion.diag()
        return hits.double() / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    @property
    def accuracy(self) -> Tensor:
        """(K,) float64: share of each class's labelled pixels that are predicted as it (recall)."""
        return self.confusion.diag().double() / self.confusion.sum(1)

    @property
    def miou(self) -> float:
        """Mean of :attr:`iou` over the classes that have one."""
        return self.iou.nanmean().item()

    @property
    def macc(self) -> float:
        """Mean of :attr:`accuracy` over the classes that have one."""
        return self.accuracy.nanmean().item()

    @property
    def allacc(self) -> float:
        """Share of all labelled pixels that are predicted right."""
        return (self.confusion.diag().sum().double() / self.confusion.sum()).item()

    def record(self) -> dict[str, Any]:
        """All scores as plain data: miou, macc, allacc, and iou by class; None where there is nothing to score."""
        return {
            "miou": _known(self.miou),
            "macc": _known(self.macc),
            "allacc": _known(self.allacc),
            "iou": [_known(value) for value in self.iou.tolist()],
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
