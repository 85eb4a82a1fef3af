"""Image and label transforms: semseg's training pipeline, in its order and with its borders, and its evaluation twin.

Images are RGB (H, W, 3), uint8, uint16 or float32 in 0..255, until :func:`normalise`; labels are uint8 (H, W). Every
random choice comes from the ``numpy.random.Generator`` given, so equal generators give equal results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from pspnet_fast.data import IGNORE_INDEX, windows
from pspnet_fast.data.images import Image, to_float
from pspnet_fast.data.labels import Label
from pspnet_fast.data.windows import Window

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pad_to(image: Image, label: Label, size: Sequence[int], border: Sequence[float]) -> tuple[Image, Label]:
    """Pad to at least ``size`` = (H, W), centred, the odd pixel after; ``border`` in the image, 255 in the label."""
    height, width = (max(wanted - given, 0) for wanted, given in zip(size, label.shape, strict=True))
    if not height and not width:
        return image, label
    sides = (height // 2, height - height // 2, width // 2, width - width // 2)
    image = cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=border)
    label = cv2.copyMakeBorder(label, *sides, cv2.BORDER_CONSTANT, value=IGNORE_INDEX)
    return image, label


def normalise(image: Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image / 255 - mean) / std per channel, as a contiguous float32 tensor (3, H, W)."""
    scale = 255 * np.asarray(std, np.float32)
    shift = 255 * np.asarray(mean, np.float32)
    planes = np.empty((3, *image.shape[:2]), np.float32)
    for channel, plane in enumerate(planes):  # one after the other: their pixels lie apart in the image
        np.subtract(image[..., channel], shift[channel], out=plane)
        plane /= scale[channel]
    return torch.from_numpy(planes)


def _to_tensors(image: Image, label: Label, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    return normalise(image, mean, std), torch.from_numpy(label.astype(np.int64))


class Choices(NamedTuple):
    """What is drawn for one training image: factor of size, degrees (None: not turned), and where the crop begins."""

    factor: float
    degrees: float | None
    blur: bool
    flip: bool
    top: int
    left: int


@dataclass(frozen=True)
class TrainTransform:
    """Scale, rotate, blur, flip, crop, normalise (semseg ``tool/train.py``).

    All choices are drawn first, so that only the pixels of the crop are resized, turned and blurred; they are the same
    as those of a crop from the whole (:mod:`pspnet_fast.data.windows`).

    Attributes:
        crop: (H, W) of the result; smaller images are padded with the mean and label 255.
        mean, std: per channel, for images in 0..1.
        scale: range of the resize factor.
        degrees: range of the rotation.
        blur: whether to blur half of the images.
    """

    crop: Sequence[int]
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    scale: Sequence[float] = (0.5, 2.0)
    degrees: Sequence[float] = (-10.0, 10.0)
    blur: bool = True

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the image (3, H, W) float32 and the label (H, W) int64."""
        choices = self.choose(label.shape, rng)
        size = windows.scaled_size(label.shape, choices.factor)
        top, left = choices.top, choices.left  # 0 where the image is smaller, which then is padded on both sides
        window = Window(top, top + self.crop[0], left, left + self.crop[1]).within(size)
        image, label = self.augment(image, label, choices, window)
        border = [255 * value for value in self.mean]
        image, label = pad_to(image, label, self.crop, border)
        return _to_tensors(image, label, self.mean, self.std)

    def choose(self, size: Sequence[int], rng: np.random.Generator) -> Choices:
        """Draw for an image of ``size`` (H, W)."""
        factor = rng.uniform(self.scale[0], self.scale[1])
        degrees = rng.uniform(self.degrees[0], self.degrees[1]) if rng.random() < 0.5 else None
        blur = self.blur and rng.random() < 0.5
        flip = rng.random() < 0.5
        rest = [
            max(given - wanted, 0) for given, wanted in zip(windows.scaled_size(size, factor), self.crop, strict=True)
        ]
        top, left = (int(rng.integers(extent, endpoint=True)) for extent in rest)
        return Choices(factor, degrees, blur, flip, top, left)

    def augment(self, image: Image, label: Label, choices: Choices, window: Window) -> tuple[Image, Label]:
        """A window of the image (uint8, uint16 or float32 in 0..255) and the label after all steps but the padding."""
        _, width = size = windows.scaled_size(label.shape, choices.factor)
        if choices.flip:
            window = Window(window.top, window.bottom, width - window.right, width - window.left)

        def scaled(part: Window) -> tuple[Image, Label]:
            return windows.scale(image, label, choices.factor, part)

        def turned(part: Window) -> tuple[Image, Label]:
            if choices.degrees is None:
                return scaled(part)
            return windows.turn(scaled, size, choices.degrees, [255 * value for value in self.mean], part)

        done = windows.blur(turned, size, window) if choices.blur else turned(window)
        return (done[0][:, ::-1], done[1][:, ::-1]) if choices.flip else done


@dataclass(frozen=True)
class EvalTransform:
    """Normalise the whole image, or (semseg's validation while training) its centre.

    Attributes:
        mean, std: per channel, for images in 0..1.
        crop: (H, W) of the centre, padded where the image is smaller; None keeps the image whole.
    """

    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    crop: Sequence[int] | None = None

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the image (3, H, W) float32 and the label (H, W) int64; ``rng`` is not used."""
        image = to_float(image)
        if self.crop is not None:
            image, label = _centre(image, label, self.crop, self.mean)
        return _to_tensors(image, label, self.mean, self.std)


@dataclass(frozen=True)
class PixelTransform:
    """The pixels as they are, or their centre as :class:`EvalTransform` takes it, which is float32.

    Attributes:
        mean: per channel, for images in 0..1; smaller images than the crop are padded with it.
        crop: (H, W) of the centre; None keeps the image whole.
    """

    mean: Sequence[float] = IMAGENET_MEAN
    crop: Sequence[int] | None = None

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the image (H, W, 3), uint8, uint16 or float32 in 0..255, and the label (H, W) uint8."""
        if self.crop is not None:
            image, label = _centre(to_float(image), label, self.crop, self.mean)
        return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(np.ascontiguousarray(label))


def _centre(image: Image, label: Label, crop: Sequence[int], mean: Sequence[float]) -> tuple[Image, Label]:
    """The centre of a float32 image and its label, padded where they are smaller."""
    image, label = pad_to(image, label, crop, [255 * value for value in mean])
    top, left = ((given - wanted) // 2 for given, wanted in zip(label.shape, crop, strict=True))
    window = np.s_[top : top + crop[0], left : left + crop[1]]
    return image[window], label[window]
