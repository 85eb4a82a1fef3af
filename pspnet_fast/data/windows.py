"""Windows of images that are resized, turned or blurred, from the pixels that they need and no others.

Each function gives the pixels that the same function gives for the whole image: labels to the bit, images but for the
last bit of float32, which OpenCV rounds otherwise at the end of a row. OpenCV's resize and warpAffine cannot do that:
they count places from the corner of the array they are given. Its remap does, and from OpenCV 5 on it is as exact.
Images are uint8, uint16 or float32 (H, W, 3), results float32 in 0..255; labels are uint8 (H, W).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.data.images import Image, to_float
from pspnet_fast.data.labels import Label

_REACH = 2  # pixels to either side that a blur of 5x5 needs


class Window(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of an image, the ends not included."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width; 0 where it is empty."""
        return max(self.bottom - self.top, 0), max(self.right - self.left, 0)

    @property
    def slices(self) -> tuple[slice, slice]:
        """To index an array with."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, by: int) -> "Window":
        """So many pixels larger on each side."""
        return Window(self.top - by, self.bottom + by, self.left - by, self.right + by)

    def within(self, size: Sequence[int]) -> "Window":
        """What of it lies in an image of this height and width."""
        return Window(max(self.top, 0), min(self.bottom, size[0]), max(self.left, 0), min(self.right, size[1]))


Part = Callable[[Window], tuple[Image, Label]]
"""Gives a window, which lies within it, of an image and its label."""


def scaled_size(size: Sequence[int], factor: float) -> tuple[int, int]:
    """Height and width of an image of ``size`` resized by ``factor``, as OpenCV rounds it."""
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def scale(image: Image, label: Label, factor: float, window: Window) -> tuple[Image, Label]:
    """Resize by ``factor``: bilinear image, nearest label, half-pixel centres as OpenCV has them."""
    size = label.shape
    if scaled_size(size, factor) == size:
        factor = 1  # so does OpenCV: what keeps its size is copied
    places = [np.arange(*window[:2]), np.arange(*window[2:])]
    nearest = [np.minimum((at / factor).astype(np.intp), n - 1) for at, n in zip(places, size, strict=True)]
    y, x = (_rounded(np.clip((at + 0.5) / factor - 0.5, 0, n - 1), size) for at, n in zip(places, size, strict=True))
    source = Window(int(y[0]), int(y[-1]) + 2, int(x[0]), int(x[-1]) + 2).within(size)
    part = to_float(image[source.slices])
    return _sample(part, source, y[:, None], x, cv2.BORDER_REPLICATE), label[nearest[0][:, None], nearest[1]]


def turn(
    part: Part, size: Sequence[int], degrees: float, border: Sequence[float], window: Window
) -> tuple[Image, Label]:
    """Turn an image of ``size`` counter-clockwise about (W/2, H/2) on the same canvas: bilinear image, nearest label.

    Uncovered pixels get ``border`` in the image and 255 in the label.
    """
    height, width = size
    matrix = cv2.invertAffineTransform(cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1))
    row, column = np.ogrid[window.top : window.bottom, window.left : window.right]
    x, y = (_rounded(along_x * column + along_y * row + start, size) for along_x, along_y, start in matrix)
    source = Window(_floor(y.min()), _floor(y.max()) + 2, _floor(x.min()), _floor(x.max()) + 2).within(size)
    turned_label = np.full(window.shape, IGNORE_INDEX, np.uint8)
    if not all(source.shape):
        return np.full((*window.shape, 3), border, np.float32), turned_label
    image, label = part(source)
    nearest_y, nearest_x = (np.floor(at + 0.5).astype(np.intp) for at in (y, x))
    inside = (nearest_x >= 0) & (nearest_x < width) & (nearest_y >= 0) & (nearest_y < height)
    turned_label[inside] = label[nearest_y[inside] - source.top, nearest_x[inside] - source.left]
    return _sample(image, source, y, x, cv2.BORDER_CONSTANT, border), turned_label


def _rounded(places: NDArray[np.float64], size: Sequence[int]) -> NDArray[np.float64]:
    """Places in an image, to 1/4096 pixel (beyond 1023 pixels a side to 1/2048, and so on).

    float32 holds these, and what is left of them after the start of a window is taken off, without further rounding.
    """
    grain = 2.0 ** (22 - max(*size, 512).bit_length())
    return np.rint(places * grain) / grain


def _floor(place: float) -> int:
    return int(np.floor(place))


def _sample(
    image: Image,
    window: Window,
    y: NDArray[np.float64],
    x: NDArray[np.float64],
    border: int,
    color: Sequence[float] = (),
) -> Image:
    """Interpolate at the places y, x, which count from the corner of the image of which ``image`` is a window."""
    y, x = np.broadcast_arrays((y - window.top).astype(np.float32), (x - window.left).astype(np.float32))
    maps = np.ascontiguousarray(x), np.ascontiguousarray(y)
    return cv2.remap(image, *maps, cv2.INTER_LINEAR, borderMode=border, borderValue=color)


def blur(part: Part, size: Sequence[int], window: Window) -> tuple[Image, Label]:
    """A 5x5 Gaussian blur of the image; for this size OpenCV takes 1 4 6 4 1 over 16, along each axis."""
    source = window.grown(_REACH).within(size)
    image, label = part(source)
    inner = Window(*(end - start for end, start in zip(window, (source.top,) * 2 + (source.left,) * 2, strict=True)))
    return cv2.GaussianBlur(image, (5, 5), 0)[inner.slices], label[inner.slices]
