"""Bilinear resizing of a band of rows, with the places of torch or of OpenCV, and scaled images a band at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from pspnet_fast.data.images import Image, to_float
from pspnet_fast.data.transforms import normalise


@dataclass(frozen=True)
class Places:
    """Where each of n results of resizing an axis lies between two neighbours.

    Attributes:
        low, high: (n,) int64, the neighbours.
        share: (n,), of ``high``; the rest is of ``low``.
    """

    low: Tensor
    high: Tensor
    share: Tensor

    def part(self, first: int, last: int) -> "Places":
        """Those of the results ``first`` to ``last``, the end not included."""
        return Places(self.low[first:last], self.high[first:last], self.share[first:last])

    @property
    def reach(self) -> tuple[int, int]:
        """First and last neighbour, the end not included."""
        return int(self.low[0]), int(self.high[-1]) + 1

    def interpolate(self, values: Tensor, axis: int, first: int = 0) -> Tensor:
        """Resize ``values`` along ``axis``; they begin with neighbour ``first``."""
        low, high = ((index - first).to(values.device) for index in (self.low, self.high))
        if not self.share.any():
            return values.index_select(axis, low)
        shape = [-1 if at == axis else 1 for at in range(values.dim())]
        share = self.share.to(values.device, values.dtype).view(shape)
        return values.index_select(axis, low).lerp(values.index_select(axis, high), share)


def torch_places(source: int, target: int, align_corners: bool, dtype: torch.dtype) -> Places:
    """As F.interpolate has them, whose arithmetic is ``dtype``, float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    at = torch.arange(target, dtype=wide)
    if align_corners:
        at *= torch.tensor(source - 1, dtype=wide) / max(target - 1, 1)
    else:
        at = ((at + 0.5) * (torch.tensor(source, dtype=wide) / target) - 0.5).clamp_min(0)
    return _between(at, source)


def opencv_places(source: int, target: int) -> Places:
    """As cv2.resize has them: half-pixel centres, rounded to float32."""
    at = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    return _between(torch.from_numpy(at).clamp(0, source - 1), source)


def _between(at: Tensor, source: int) -> Places:
    low = at.long().clamp_max(source - 1)
    return Places(low, (low + 1).clamp_max(source - 1), at - low)


class ScaledImages:
    """Images of one size, scaled, padded and normalised, of which a band of rows at a time is made.

    Args:
        images: each (H, W, 3), uint8, uint16, or float32 in 0..255.
        size: (height, width) to which they are scaled, bilinearly as cv2.resize does it.
        padding: pixels of the mean above, below, left and right of it.
        rounded: whether scaled images have the dtype of the images, else float32.
        mean, std: per channel, for images in 0..1.
    """

    def __init__(
        self,
        images: Sequence[Image],
        size: tuple[int, int],
        padding: tuple[int, int, int, int],
        rounded: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        above, below, left, right = padding
        self.size = (size[0] + above + below, size[1] + left + right)
        """Height and width with the padding."""
        self._padding, self._mean, self._std = padding, mean, std
        if rounded and images[0].shape[:2] != size:  # OpenCV rounds inside, so that only the whole is the same
            images = [cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR) for image in images]
        self._images, self._scaled = list(images), size

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last``, the end not included: (N, 3, last - first, W) float32."""
        above, _, left, _ = self._padding
        height, width = self._scaled
        result = torch.zeros(len(self._images), 3, last - first, self.size[1])
        top, bottom = max(first - above, 0), min(last - above, height)
        if top < bottom:
            inside = result[:, :, top + above - first : bottom + above - first, left : left + width]
            for place, image in zip(inside, self._images, strict=True):
                place.copy_(normalise(self._band(image, top, bottom), self._mean, self._std))
        return result

    def _band(self, image: Image, top: int, bottom: int) -> Image:
        (height, width), (_, scaled_width) = image.shape[:2], self._scaled
        if (height, width) == self._scaled:
            return to_float(image[top:bottom])
        rows = opencv_places(height, self._scaled[0]).part(top, bottom)
        first, last = rows.reach
        source = to_float(image[first:last])
        if scaled_width != width:
            source = cv2.resize(source, (scaled_width, last - first), interpolation=cv2.INTER_LINEAR)
        return rows.interpolate(torch.from_numpy(np.ascontiguousarray(source)), 0, first).numpy()

    def __len__(self) -> int:
        return len(self._images)
