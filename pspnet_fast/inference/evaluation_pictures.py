"""Pictures of an evaluation: the confusion matrix, and where a prediction is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.files import replacing
from pspnet_fast.inference.lettering import drawable, families
from pspnet_fast.inference.render import Picture

_RED = (220, 30, 30)
_NUMBERED = 25  # most classes whose matrix has its numbers written in


def draw_confusion(confusion: NDArray[np.integer], names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix (K, K), row = label, as shares of each row into a PNG file.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    texts = [drawable(name) for name in names]
    side = 2.5 + 0.32 * max(len(names), 8)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the label's pixels", shrink=0.8)
    labels = [text.replace("$", r"\$") for text in texts]  # else it is a formula
    font: dict[str, Any] = {"family": families(texts), "size": "small"}
    axes.set_xticks(range(len(names)), labels, rotation=90, **font)
    axes.set_yticks(range(len(names)), labels, **font)
    axes.set(xlabel="prediction", ylabel="label", title="confusion matrix")
    if len(names) <= _NUMBERED:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share = shares[row, column]
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", size="x-small", color=color)
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def error_map(image: Picture, label: NDArray[np.integer], prediction: NDArray[np.integer]) -> Picture:
    """The image in grey, pale red where the prediction differs from the label; ignored pixels dark and hatched."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    picture: Picture = np.repeat(grey[..., None], 3, 2).astype(np.uint8)
    ignored = label == IGNORE_INDEX
    wrong = (prediction != label) & ~ignored
    picture[wrong] = np.rint(0.3 * picture[wrong] + 0.7 * np.asarray(_RED)).astype(np.uint8)
    row, column = np.ogrid[: label.shape[0], : label.shape[1]]
    stripes = (row + column) % 8 < 2
    picture[ignored] //= 3
    picture[ignored & stripes] = 90
    return picture


def save_jpeg(path: Path, picture: Picture, quality: int = 90) -> None:
    """Write a picture as JPEG; whole or not at all.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    written, encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert written
    with replacing(path, encoded.nbytes) as file:
        file.write(encoded.tobytes())
