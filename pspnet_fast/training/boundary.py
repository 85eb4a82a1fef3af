"""Boundary IoU (Cheng, Girshick, Dollar, Berg, Kirillov: Boundary IoU, CVPR 2021) of label maps.

Of the pixels G of a class in the labels, G_d are those at most d from its contour; P and P_d are the same of the
prediction. Boundary IoU = |G_d and P_d| / |G_d or P_d|, where d is 2 % of the image's diagonal, at least 1 pixel, in
the maximum norm, as the authors' code erodes d times by a 3x3 square; the image's border is a contour. The paper's
measure is of single objects; here, as for IoU, both counts are summed over all images before they are divided. Ignored
pixels are no part of any class, in the label nor in the prediction, and do not count.
"""

import math
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pspnet_fast.data import IGNORE_INDEX

DILATION = 0.02  # of the diagonal


def boundary_counts(label: NDArray[Any], prediction: NDArray[Any], classes: int) -> Tensor:
    """(2, K) int64: pixels in the intersection and in the union of the two boundaries of each class.

    Args:
        label, prediction: (H, W) in 0..K-1, K <= 255; 255 in the label is ignored.
    """
    label = label.astype(np.uint8)
    counted = label != IGNORE_INDEX
    prediction = np.where(counted, prediction, IGNORE_INDEX).astype(np.uint8)
    distance = max(round(DILATION * math.hypot(*label.shape)), 1)
    near = [_near_contour(labels, distance) & counted for labels in (label, prediction)]
    parts = label[near[0] & near[1] & (label == prediction)], label[near[0]], prediction[near[1]]
    both, of_label, of_prediction = (np.bincount(part, minlength=classes) for part in parts)
    return torch.from_numpy(np.stack([both, of_label + of_prediction - both]))


def boundary_iou(counts: Tensor) -> Tensor:
    """(K,) float64 from (2, K) counts; NaN for a class that neither labels nor predictions have."""
    intersection, union = counts.double()
    return intersection / union


def _near_contour(labels: NDArray[np.uint8], distance: int) -> NDArray[np.bool_]:
    """Whether a pixel's square neighbourhood holds another class, or leaves the image.

    That is the boundary of every class at once: where a class's region, eroded by the square, has gone.
    """
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    near = cv2.dilate(labels, square) != cv2.erode(labels, square)
    near[:distance] = near[-distance:] = True
    near[:, :distance] = near[:, -distance:] = True
    return near
