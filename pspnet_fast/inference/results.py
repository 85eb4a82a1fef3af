"""What is written of a prediction: label maps, pictures, confidence and probabilities."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pspnet_fast.data.images import Image
from pspnet_fast.files import replacing
from pspnet_fast.inference.predict import Prediction, Predictor
from pspnet_fast.inference.render import colorize, overlay, save_png, with_legend


def make_results(
    image: Image, prediction: Prediction, predictor: Predictor, outputs: Collection[str], legend: bool = False
) -> dict[str, NDArray[Any]]:
    """The arrays of the outputs that are asked for, by their names in :data:`pspnet_fast.inference.plan.ENDS`.

    Args:
        image: (H, W, 3) in 0..255.
        legend: name the classes that occur below the overlay.

    Returns:
        "labels" (H, W) uint8; "palette" and "overlay" uint8 RGB; "confidence" (H, W) uint8, 255 for certain;
        "probabilities" (K, H, W) float16.
    """
    labels, colors = prediction.labels, predictor.colors
    made: dict[str, NDArray[Any]] = {}
    if "labels" in outputs:
        made["labels"] = labels
    if "palette" in outputs:
        made["palette"] = colorize(labels, colors)
    if "overlay" in outputs:
        made["overlay"] = overlay(image.astype(np.uint8), labels, colors)
        if legend:
            made["overlay"] = with_legend(made["overlay"], np.unique(labels).tolist(), predictor.class_names, colors)
    if "confidence" in outputs:
        assert prediction.confidence is not None
        made["confidence"] = np.rint(255 * prediction.confidence).astype(np.uint8)
    if "probabilities" in outputs:
        assert prediction.probabilities is not None
        made["probabilities"] = prediction.probabilities.astype(np.float16)
    return made


def save_result(path: Path, result: NDArray[Any]) -> None:
    """Write a result as the suffix says, PNG or numpy's .npy; whole or not at all.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    if path.suffix == ".npy":
        with replacing(path, result.nbytes) as file:
            np.save(file, result)
    else:
        save_png(path, result)
