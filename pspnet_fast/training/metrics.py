"""Scores from counts of pixels: of a confusion matrix as ops.confusion_matrix makes it, and image by image.

With hits I = pixels of a class that are predicted as it, T = its labelled pixels, P = pixels predicted as it:

- IoU = I / (T + P - I), Jaccard (1912); mIoU is its mean over classes (Everingham et al., PASCAL VOC, 2010)
- Dice = 2 I / (T + P), Dice (1945); the F1 score of pixels
- accuracy = I / T, the recall; mAcc is its mean, allAcc = sum I / sum T
- frequency-weighted IoU = sum (T / sum T) IoU (Long, Shelhamer, Darrell, CVPR 2015)
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ABSENT = {"zero": 0.0, "one": 1.0}


@dataclass(frozen=True)
class Metrics:
    """Scores of a confusion matrix (K, K) int64, row = label, column = prediction.

    A class that neither labels nor predictions hold has no IoU and no Dice (NaN), one without a labelled pixel no
    accuracy; a class that is only predicted has IoU 0. What such a class counts in a mean is ``absent``: "skip"
    nothing, as in mmseg, "zero" 0, as in semseg, "one" 1, as in PaddleSeg, "nan" makes the mean NaN, as in torchvision.

    Raises:
        ValueError: ``absent`` is none of these.
    """

    confusion: Tensor
    absent: str = "skip"

    def __post_init__(self) -> None:
        if self.absent not in ("skip", "nan", *_ABSENT):
            raise ValueError(f"absent must be 'skip', 'zero', 'one' or 'nan', got {self.absent!r}")

    @property
    def iou(self) -> Tensor:
        """(K,) float64: intersection over union of each class."""
        return self._hits / (self._predicted + self._labelled - self._hits)

    @property
    def dice(self) -> Tensor:
        """(K,) float64: twice the intersection over the sum of both sets."""
        return 2 * self._hits / (self._predicted + self._labelled)

    @property
    def accuracy(self) -> Tensor:
        """(K,) float64: share of each class's labelled pixels that are predicted as it (recall)."""
        return self._hits / self._labelled

    @property
    def miou(self) -> float:
        """Mean of :attr:`iou` over the classes."""
        return self.mean(self.iou)

    @property
    def mdice(self) -> float:
        """Mean of :attr:`dice` over the classes."""
        return self.mean(self.dice)

    @property
    def macc(self) -> float:
        """Mean of :attr:`accuracy` over the classes."""
        return self.mean(self.accuracy)

    @property
    def allacc(self) -> float:
        """Share of all labelled pixels that are predicted right."""
        return (self._hits.sum() / self._labelled.sum()).item()

    @property
    def fwiou(self) -> float:
        """Mean of :attr:`iou` weighted by the share of each class in the labels; absent classes have weight 0."""
        share = self._labelled / self._labelled.sum()
        return torch.where(share == 0, 0.0, share * self.iou).sum().item()

    def mean(self, values: Tensor) -> float:
        """Mean of the classes' values (K,), NaN where a class has none, by the rule for absent classes."""
        return _mean(values, self.absent).item()

    def record(self) -> dict[str, Any]:
        """What a validation in training keeps: miou, macc, allacc, and iou by class; None for what is not defined."""
        return {
            "miou": known(self.miou),
            "macc": known(self.macc),
            "allacc": known(self.allacc),
            "iou": [known(value) for value in self.iou.tolist()],
        }

    @property
    def _hits(self) -> Tensor:
        return self.confusion.diag().double()

    @property
    def _labelled(self) -> Tensor:
        return self.confusion.sum(1).double()

    @property
    def _predicted(self) -> Tensor:
        return self.confusion.sum(0).double()


def image_counts(confusion: Tensor) -> Tensor:
    """(3, K) int64 from the confusion matrix of one image: hits, labelled pixels, predicted pixels of each class."""
    return torch.stack([confusion.diag(), confusion.sum(1), confusion.sum(0)])


def image_ious(counts: Tensor) -> Tensor:
    """Mean IoU of single images over the classes that an image's label or prediction has: (..., 3, K) -> (...).

    NaN for an image without a labelled pixel. An image has few of the classes, so that others never count here.
    """
    hits, labelled, predicted = counts.double().unbind(-2)
    return (hits / (labelled + predicted - hits)).nanmean(-1)


def bootstrap_interval(
    counts: Tensor, absent: str = "skip", samples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of mIoU under drawing as many images with replacement (Efron, 1979).

    The mIoU of a sample is that of the sums over its images. It tells how far the score hangs on the choice of images,
    not on the training.

    Args:
        counts: (images, 3, K) int64, of :func:`image_counts`.
        absent: rule for absent classes, see :class:`Metrics`; a sample may lack a class that the whole has.
        samples, level, seed: number of samples, share of them in the interval, seed of their choice.

    Returns:
        low and high, NaN without images or where a sample's mIoU is NaN.
    """
    images = len(counts)
    if not images:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples)
    sums = torch.from_numpy(drawn).double() @ counts.flatten(1).double()  # exact below 2**53
    hits, labelled, predicted = sums.view(samples, *counts.shape[1:]).unbind(1)
    scores = _mean(hits / (labelled + predicted - hits), absent)
    tail = (1 - level) / 2
    low, high = torch.quantile(scores, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _mean(values: Tensor, absent: str) -> Tensor:
    """Mean over the last axis by the rule for absent classes; NaN where no class at all has a value."""
    if absent == "skip":
        return values.nanmean(-1)
    if absent == "nan":
        return values.mean(-1)
    nothing = values.isnan().all(-1)
    return values.nan_to_num(nan=_ABSENT[absent]).mean(-1).masked_fill(nothing, math.nan)


def known(value: float) -> float | None:
    """The value, or None for NaN, which JSON has no word for."""
    return None if math.isnan(value) else value
