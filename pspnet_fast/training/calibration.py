"""How far a model's confidence can be trusted: reliability curve and expected calibration error.

Pixels are sorted by the probability c of the predicted class into M bins of equal width, (m/M, (m+1)/M]. With n_m
pixels in a bin, acc_m the share of right ones and conf_m the mean of c,

    ECE = sum over m of n_m / n * |acc_m - conf_m|        (Guo, Pleiss, Sun, Weinberger, ICML 2017)
"""

from typing import Any

import torch
from torch import Tensor

from pspnet_fast.data import IGNORE_INDEX

BINS = 15  # as Guo et al. have it


def calibration_counts(classes: Tensor, confidence: Tensor, labels: Tensor) -> Tensor:
    """(3, M) float64 by bin: pixels, right ones among them, sum of their confidence.

    Args:
        classes, confidence, labels: of one shape and device; pixels labelled 255 do not count.
    """
    counted = labels != IGNORE_INDEX
    confidence = confidence[counted].double()
    bins = ((confidence * BINS).ceil().long() - 1).clamp_(0, BINS - 1)
    values = torch.ones_like(confidence), (classes[counted] == labels[counted]).double(), confidence
    return torch.stack([torch.bincount(bins, value, minlength=BINS) for value in values])


def calibration_record(counts: Tensor) -> dict[str, Any]:
    """Edges of the bins, in each count, mean confidence and accuracy (None where it is empty), and "ece"."""
    pixels, right, confidence = counts.cpu().unbind()
    total = pixels.sum()
    gaps = (right - confidence).abs().sum() / total

    def means(sums: Tensor) -> list[float | None]:
        return [(value / count).item() if count else None for value, count in zip(sums, pixels, strict=True)]

    return {
        "edges": [index / BINS for index in range(BINS + 1)],
        "count": pixels.long().tolist(),
        "confidence": means(confidence),
        "accuracy": means(right),
        "ece": gaps.item() if total else None,
    }
