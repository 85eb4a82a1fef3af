"""Pictures of a data set: how often its classes occur, how large its images are, and some of its images and labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from pspnet_fast.data.images import Image
from pspnet_fast.data.labels import Label
from pspnet_fast.data.survey import Summary
from pspnet_fast.files import replacing
from pspnet_fast.inference.lettering import drawable, families
from pspnet_fast.inference.render import Color, Picture, colorize, overlay, side_by_side

TILE = (270, 360)  # height, width of a picture in the sheet


def draw_histogram(summaries: Mapping[str, Summary], names: Sequence[str], colors: Sequence[Color], path: Path) -> None:
    """Plot the share of each class in the labelled pixels, and the sizes of the images, into a PNG file.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = [drawable(name) for name in names]
    figure = Figure(figsize=(12, max(4.0, 0.22 * len(names) + 1)), layout="constrained")
    classes, sizes = figure.subplots(1, 2, width_ratios=(2, 1))
    height = 0.8 / len(summaries)
    for number, (part, summary) in enumerate(summaries.items()):
        pixels = summary.pixels[:-1]
        share = pixels / max(pixels.sum(), 1)
        places = np.arange(len(names)) + (number - (len(summaries) - 1) / 2) * height
        hatch = "" if number == 0 else "////"
        paint = [tuple(channel / 255 for channel in color) for color in colors]
        classes.barh(places, share, height, color=paint, edgecolor="black", linewidth=0.4, hatch=hatch, label=part)
        counts = summary.sizes
        sizes.scatter(
            [width for _, width in counts],
            [height for height, _ in counts],
            [20 + 60 * count / max(counts.values()) for count in counts.values()],
            alpha=0.6,
            label=f"{part}: {len(summary.files)} images",
        )
    labels = [text.replace("$", r"\$") for text in texts]  # else it is a formula
    classes.set_yticks(range(len(names)), labels, family=families(texts), size="small")
    classes.invert_yaxis()
    classes.set(xscale="log", title="share of the labelled pixels", ylim=(len(names) - 0.5, -0.5))
    sizes.set(title="sizes of the images", xlabel="width", ylabel="height", xlim=(0, None), ylim=(0, None))
    for axes in (classes, sizes):
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def draw_samples(pairs: Sequence[tuple[Image, Label]], names: Sequence[str], colors: Sequence[Color]) -> Picture:
    """Lay out images, their labels and both in one, a row each, scaled into tiles of one size."""
    rows = []
    for image, label in pairs:
        picture = image.astype(np.uint8)
        row = (picture, colorize(label, colors), overlay(picture, label, colors))
        rows.append([_into_tile(each) for each in row])
    present = sorted({int(value) for _, label in pairs for value in np.unique(label) if value < len(names)})
    legend = [names[index] for index in present], [colors[index] for index in present]
    return side_by_side(rows, ["image", "label", "both"], *legend)


def _into_tile(picture: Picture) -> Picture:
    factor = min(tile / extent for tile, extent in zip(TILE, picture.shape, strict=False))
    width, height = (max(round(factor * extent), 1) for extent in (picture.shape[1], picture.shape[0]))
    tile = np.full((*TILE, 3), 255, np.uint8)
    tile[:height, :width] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST)
    return tile
