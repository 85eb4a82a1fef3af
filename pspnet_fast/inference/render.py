"""Pictures of label maps. A picture is uint8 RGB (H, W, 3)."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pspnet_fast.files import replacing
from pspnet_fast.inference.lettering import drawable, text_width, write

Picture = NDArray[np.uint8]
Color = Sequence[int]

_LETTERS = 13  # size of the letters, pixels
_LINE = 22  # height of a line of text, pixels
_GAP = 8  # between neighbours, pixels
_SWATCH = 14  # width of a legend entry's colour, pixels
_BLACK = (0, 0, 0)


def save_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture (H, W, 3), or a map of class indices (H, W), as PNG; whole or not at all.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    written, encoded = cv2.imencode(".png", picture[..., ::-1] if picture.ndim == 3 else picture)
    assert written
    with replacing(path, encoded.nbytes) as file:
        file.write(encoded.tobytes())


def palette(classes: int) -> list[tuple[int, int, int]]:
    """Colours for classes that have none of their own: different ones, neighbours far apart, none of them black."""
    hues = [index * 0.6180339887 % 1 for index in range(classes)]  # the golden ratio spreads any number of them
    values = [(1.0, 0.75, 0.9, 0.6)[index // 8 % 4] for index in range(classes)]
    saturations = [(0.9, 0.55)[index // 32 % 2] for index in range(classes)]
    colors = map(colorsys.hsv_to_rgb, hues, saturations, values)
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colors]


def colorize(label: NDArray[np.integer], colors: Sequence[Color]) -> Picture:
    """Paint a label map (H, W) with the colour of each class; 255 becomes black.

    Raises:
        ValueError: a label is neither 255 nor a class with a colour.
    """
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colors)] = colors
    known = (label == 255) | ((label >= 0) & (label < len(colors)))
    if not known.all():
        raise ValueError(f"label must hold 0..{len(colors) - 1} or 255, got {label[~known].flat[0]}")
    return palette[label]


def overlay(image: Picture, label: NDArray[np.integer], colors: Sequence[Color], alpha: float = 0.5) -> Picture:
    """Blend the class colours over the image: (1 - alpha) * image + alpha * colour; pixels labelled 255 stay."""
    blended = np.rint((1 - alpha) * image + alpha * colorize(label, colors)).astype(np.uint8)
    return np.where((label == 255)[..., None], image, blended)


def side_by_side(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[str],
    class_names: Sequence[str],
    colors: Sequence[Color],
    scale: int = 1,
) -> Picture:
    """Lay rows of pictures out as a table with a title over each column and a legend of the classes below.

    Args:
        rows: pictures of one size, as many in each row as there are titles.
        titles: of the columns.
        class_names, colors: of the legend, by class index.
        scale: whole factor by which small pictures are enlarged (nearest).

    Raises:
        ValueError: a row has another number of pictures than there are titles, or the pictures differ in size.
    """
    if any(len(row) != len(titles) for row in rows) or not rows or not titles:
        raise ValueError(
            f"rows must have {len(titles)} pictures each (one per title), got {[len(row) for row in rows]}"
        )
    shapes = {picture.shape for row in rows for picture in row}
    if len(shapes) != 1:
        raise ValueError(f"rows must hold pictures of one size, got {sorted(shapes)}")
    height, width, _ = (scale * extent for extent in shapes.pop())
    sheet_width = len(titles) * (width + _GAP) - _GAP
    below = _legend(class_names, colors, sheet_width)
    table_height = _LINE + len(rows) * (height + _GAP)
    canvas = np.full((table_height + below.shape[0], sheet_width, 3), 255, np.uint8)
    for column, title in enumerate(titles):
        _write(canvas, title, column * (width + _GAP), 0)
    for row, pictures in enumerate(rows):
        top = _LINE + row * (height + _GAP)
        for column, picture in enumerate(pictures):
            left = column * (width + _GAP)
            canvas[top : top + height, left : left + width] = picture.repeat(scale, 0).repeat(scale, 1)
    canvas[table_height:] = below[:, :sheet_width]
    return canvas


def with_legend(
    picture: Picture, present: Sequence[int], class_names: Sequence[str], colors: Sequence[Color]
) -> Picture:
    """The picture with a legend of the classes ``present`` (indices) below it.

    The picture's pixels keep their places at the top left; where it is narrower than a legend's entry the rest is
    white. The legend's text grows with the picture.
    """
    height, width, _ = picture.shape
    scale = max(round(width / 1000), 1)
    names = [class_names[index] for index in present]
    below = _legend(names, [colors[index] for index in present], width // scale)
    below = below.repeat(scale, 0).repeat(scale, 1)
    canvas = np.full((height + below.shape[0], max(width, below.shape[1]), 3), 255, np.uint8)
    canvas[:height, :width] = picture
    canvas[height:, : below.shape[1]] = below
    return canvas


def _legend(names: Sequence[str], colors: Sequence[Color], width: int) -> Picture:
    """A colour and a name for each class, in lines of ``width`` pixels, or as wide as the widest entry."""
    texts = [drawable(name) for name in names]
    entries, lines = _legend_layout(texts, width)
    widest = max((_advance(text) for text in texts), default=0)
    canvas = np.full((lines * _LINE, max(width, widest), 3), 255, np.uint8)
    for (left, line), text, color in zip(entries, texts, colors, strict=True):
        top = line * _LINE
        corners = (left, top + 4), (left + _SWATCH, top + _LINE - 5)
        cv2.rectangle(canvas, *corners, tuple(map(int, color)), cv2.FILLED)
        cv2.rectangle(canvas, *corners, _BLACK)
        _write(canvas, text, left + _SWATCH + _GAP // 2, top)
    return canvas


def _advance(text: str) -> int:
    return _SWATCH + _GAP // 2 + text_width(text, _LETTERS) + 2 * _GAP


def _legend_layout(names: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """Place entries from left to right, breaking at ``width``: ((left, line) of each, number of lines)."""
    entries: list[tuple[int, int]] = []
    left = line = 0
    for name in names:
        advance = _advance(name)
        if left and left + advance > width:
            left, line = 0, line + 1
        entries.append((left, line))
        left += advance
    return entries, line + 1


def _write(canvas: Picture, text: str, left: int, top: int) -> None:
    write(canvas[top : top + _LINE], text, left, 15, _LETTERS)
