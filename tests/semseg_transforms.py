"""semseg's training pipeline on whole images, written down with OpenCV's functions."""

import cv2
import numpy as np

from pspnet_fast.data.transforms import TrainTransform

Pair = tuple[np.ndarray, np.ndarray]


def augment(transform: TrainTransform, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> Pair:
    """Image float32 (H, W, 3) in 0..255 and label uint8 (H, W) of the crop, before they are normalised."""
    border = [255 * value for value in transform.mean]
    factor = rng.uniform(*transform.scale)
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    height, width = label.shape
    if rng.random() < 0.5:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(*transform.degrees), 1)
        how = {"dsize": (width, height), "borderMode": cv2.BORDER_CONSTANT}
        image = cv2.warpAffine(image, matrix, flags=cv2.INTER_LINEAR, borderValue=border, **how)
        label = cv2.warpAffine(label, matrix, flags=cv2.INTER_NEAREST, borderValue=255, **how)
    if transform.blur and rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    pads = [max(wanted - given, 0) for wanted, given in zip(transform.crop, label.shape, strict=True)]
    sides = [part for pad in pads for part in (pad // 2, pad - pad // 2)]
    image = cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=border)
    label = cv2.copyMakeBorder(label, *sides, cv2.BORDER_CONSTANT, value=255)
    top, left = (
        rng.integers(size - crop, endpoint=True) for size, crop in zip(label.shape, transform.crop, strict=True)
    )
    window = np.s_[top : top + transform.crop[0], left : left + transform.crop[1]]
    return image[window], label[window]
