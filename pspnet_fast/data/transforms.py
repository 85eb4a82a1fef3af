"""Image and label transforms: semseg's training pipeline, in its order and with its borders, and its evaluation twin.

Images are float32 RGB (H, W, 3) in 0..255 until :func:`normalise`; labels are uint8 (H, W). Every random choice comes
from the ``numpy.random.Generator`` given, so equal generators give equal results.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.data.images import Image
from pspnet_fast.data.labels import Label

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def random_scale(image: Image, label: Label, rng: np.random.Generator, factors: Sequence[float]) -> tuple[Image, Label]:
    """Resize by one factor drawn from U(factors[0], factors[1]); bilinear image, nearest label."""
    factor = rng.uniform(factors[0], factors[1])
    return (
        cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR),
        cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST),
    )


def random_rotate(
    image: Image, label: Label, rng: np.random.Generator, degrees: Sequence[float], border: Sequence[float]
) -> tuple[Image, Label]:
    """With probability 0.5 turn by U(degrees[0], degrees[1]) about (W/2, H/2) on the same canvas.

    Uncovered pixels get ``border`` in the image and 255 in the label.
    """
    if rng.random() >= 0.5:
        return image, label
    height, width = label.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(degrees[0], degrees[1]), 1)
    image = cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=border
    )
    label = cv2.warpAffine(
        label,
        matrix,
        (width, height),
        flags=cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=IGNORE_INDEX,
    )
    return image, label


def random_blur(image: Image, rng: np.random.Generator) -> Image:
    """With probability 0.5 a 5x5 Gaussian blur; for this size OpenCV takes 1 4 6 4 1 over 16, along each axis."""
    return cv2.GaussianBlur(image, (5, 5), 0) if rng.random() < 0.5 else image


def random_flip(image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
    """With probability 0.5 mirror left to right."""
    return (image[:, ::-1], label[:, ::-1]) if rng.random() < 0.5 else (image, label)


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
    return torch.from_numpy(np.ascontiguousarray(((image - shift) / scale).transpose(2, 0, 1)))


def _to_tensors(image: Image, label: Label, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    return normalise(image, mean, std), torch.from_numpy(label.astype(np.int64))


@dataclass(frozen=True)
class TrainTransform:
    """Scale, rotate, blur, flip, crop, normalise (semseg ``tool/train.py``).

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
        border = [255 * value for value in self.mean]
        image, label = random_scale(image, label, rng, self.scale)
        image, label = random_rotate(image, label, rng, self.degrees, border)
        if self.blur:
            image = random_blur(image, rng)
        image, label = random_flip(image, label, rng)
        image, label = pad_to(image, label, self.crop, border)
        height, width = self.crop
        top = rng.integers(label.shape[0] - height, endpoint=True)
        left = rng.integers(label.shape[1] - width, endpoint=True)
        window = np.s_[top : top + height, left : left + width]
        return _to_tensors(image[window], label[window], self.mean, self.std)


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
        if self.crop is not None:
            image, label = pad_to(image, label, self.crop, [255 * value for value in self.mean])
            top, left = ((given - wanted) // 2 for given, wanted in zip(label.shape, self.crop, strict=True))
            window = np.s_[top : top + self.crop[0], left : left + self.crop[1]]
            image, label = image[window], label[window]
        return _to_tensors(image, label, self.mean, self.std)
