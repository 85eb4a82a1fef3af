"""Pictures of what a model predicts of the first validation images."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pspnet_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from pspnet_fast.inference.predict import predict_labels
from pspnet_fast.inference.render import Picture, colorize, palette
from pspnet_fast.training.loading import Item

WIDEST = 400  # pixels, of the image, the truth and the prediction each
IMAGES = 3


@torch.inference_mode()
def validation_pictures(
    model: nn.Module,
    dataset: Dataset[Item],
    classes: int,
    metadata: Mapping[str, Any],
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> list[Picture]:
    """Of the first images: image, truth and prediction beside each other, at most ``WIDEST`` pixels wide each.

    Args:
        model: as :func:`pspnet_fast.inference.predict.predict_labels` takes it; evaluates for the time of the call.
        dataset: items are (image (3, H, W) float32, label (H, W) int64).
        metadata: of the checkpoint: "colors", "mean", "std"; where there are none generated ones, and ImageNet's.
        autocast: dtype to run the model in; None is its own.
    """
    colors = metadata.get("colors") or palette(classes)
    mean, std = (
        np.asarray(metadata.get(key, usual)) for key, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
    )
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    was_training = model.training
    model.eval()
    drawn = []
    for index in range(min(IMAGES, len(dataset))):  # type: ignore[arg-type]
        image, label = dataset[index]
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            prediction = predict_labels(model, image[None].to(device, dtype))[0]
        pixels = np.clip(255 * (image.permute(1, 2, 0).numpy() * std + mean), 0, 255).astype(np.uint8)
        drawn.append(_row(pixels, label, prediction.cpu(), colors))
    model.train(was_training)
    return drawn


def _row(image: Picture, label: Tensor, prediction: Tensor, colors: Sequence[Sequence[int]]) -> Picture:
    factor = min(WIDEST / image.shape[1], 1)
    size = max(round(factor * image.shape[1]), 1), max(round(factor * image.shape[0]), 1)
    maps = [
        cv2.resize(each.numpy().astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)
        for each in (label, prediction)
    ]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.concatenate([small, *(colorize(each, colors) for each in maps)], 1)
