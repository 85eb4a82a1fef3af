"""Reading label files: their values or colours, and the classes that these mean."""

import functools
import io
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pspnet_fast.data import IGNORE_INDEX, DataError, UnreadableError
from pspnet_fast.data.conventions import (
    CLASSES,
    CONVENTIONS,
    Color,
    Remap,
    classes_by_color,
    classes_by_value,
    hint,
)
from pspnet_fast.data.images import read_content

Label = NDArray[Any]  # uint8 (H, W)

_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "WEBP")
_LAST_VALUE = 65535
_UNKNOWN = -1


@dataclass(frozen=True)
class LabelReader:
    """Reads label files as classes.

    Attributes:
        classes: number of classes K.
        convention: what values mean, one of :data:`~pspnet_fast.data.conventions.CONVENTIONS`.
        remap: ``{value: class}``, see :meth:`~pspnet_fast.data.conventions.Remap.parse`; instead of a convention.
        colors: of the classes, for labels that are coloured; None where they are not known.

    Raises:
        ValueError: an unknown convention, one of another number of classes, or a remap that it excludes or that names
            a class that does not exist.
    """

    classes: int
    convention: str = "index"
    remap: Mapping[Any, Any] = field(default_factory=dict)
    colors: Sequence[Color] | None = None

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ValueError(f"data.labels must be one of {', '.join(map(repr, CONVENTIONS))}, got {self.convention!r}")
        if (known := CLASSES.get(self.convention, self.classes)) != self.classes:
            raise ValueError(f"data.labels={self.convention} has {known} classes, the names given are {self.classes}")
        if self.remap and self.convention not in ("index", "color"):
            raise ValueError(f"data.remap needs data.labels=index or color, got {self.convention}")
        parsed = self._parsed
        if parsed.values and self.convention == "color":
            raise ValueError(f"data.remap must have colours 'R G B' as keys if labels=color, got {min(parsed.values)}")
        for value in (*parsed.values.values(), *parsed.colors.values(), parsed.other):
            if value is not None and self.classes <= value < IGNORE_INDEX:
                raise ValueError(f"data.remap must map to the classes 0..{self.classes - 1} or 255, got {value}")

    def __call__(self, path: Path, oriented: bool = True) -> Label:
        """Read a label as uint8 (H, W), a class or 255 per pixel, turned as its EXIF orientation (if any) says.

        A file of one channel holds values, whatever colours its palette shows them in; one of three holds colours.

        Args:
            oriented: False leaves the label as it is stored.

        Raises:
            DataError: the file is missing, not whole, lossy or no image; it holds values or colours that are no class.
        """
        pixels = read_pixels(path, self.convention == "color", oriented)
        label = self._classes(path, pixels)
        if (label == _UNKNOWN).any():
            raise DataError(f"{path}: {self._describe(pixels, label == _UNKNOWN)}")
        return label.astype(np.uint8)

    def inspect(self, path: Path, oriented: bool = True) -> tuple[Label, dict[str, int]]:
        """Read a label as :meth:`__call__` does, with 255 for what is no class, and count that.

        Returns:
            The label, and the pixels of each value (``"7"``) or colour (``"120 3 0"``) that is none, by frequency.

        Raises:
            DataError: the file is missing, not whole, lossy or no image.
        """
        pixels = read_pixels(path, self.convention == "color", oriented)
        label = self._classes(path, pixels)
        unknown = label == _UNKNOWN
        values, counts = np.unique(pixels[unknown], axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        found = {" ".join(map(str, np.atleast_1d(values[index]).tolist())): int(counts[index]) for index in order}
        return np.where(unknown, IGNORE_INDEX, label).astype(np.uint8), found

    @property
    def is_identity(self) -> bool:
        """Whether values are taken for the classes as they are."""
        return self.convention == "index" and not self.remap

    @functools.cached_property
    def _parsed(self) -> Remap:
        try:
            return Remap.parse(self.remap)
        except ValueError as error:
            raise ValueError(f"data.remap {error}") from None

    @functools.cached_property
    def _by_value(self) -> dict[int, int]:
        return classes_by_value(self.convention, self.classes, self._parsed)

    @functools.cached_property
    def _table(self) -> NDArray[np.int16]:
        """Class by value, _UNKNOWN where there is none."""
        other = self._parsed.other
        table = np.full(_LAST_VALUE + 1, _UNKNOWN if other is None else other, np.int16)
        for value, index in self._by_value.items():
            if value <= _LAST_VALUE:
                table[value] = index
        return table

    def _classes(self, path: Path, pixels: NDArray[Any]) -> NDArray[np.int16]:
        """Class or 255 of values (H, W) or colours (H, W, 3), _UNKNOWN where there is none."""
        if pixels.ndim == 2:
            return self._table[pixels]
        try:
            codes, classes = self._color_codes
        except DataError as error:
            raise DataError(f"{path}: {error}{_hint_at_grey(pixels)}") from None
        found = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        place = np.minimum(np.searchsorted(codes, found), len(codes) - 1)
        other = self._parsed.other
        return np.where(codes[place] == found, classes[place], np.int16(_UNKNOWN if other is None else other))

    def _describe(self, pixels: NDArray[Any], unknown: NDArray[np.bool_]) -> str:
        """What is no class, and the likely remedy."""
        wrong = pixels[unknown]
        if pixels.ndim == 3:
            return self._describe_colors(wrong) + _hint_at_grey(pixels)
        values = np.unique(wrong).tolist()
        named = f"value {values[0]}" if len(values) == 1 else f"values {_first(values)}"
        remedy = hint(self.convention, self.classes, bool(self.remap), values)
        return (
            f"label {named} ({wrong.size} pixels outside the classes); allowed are {_ranges(self._by_value)}; {remedy}"
        )

    @functools.cached_property
    def _color_codes(self) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
        """Colours as numbers, ascending, and the class of each."""
        known: dict[Color, int] = classes_by_color(self.convention)
        if self.colors is None and not known:
            raise DataError("a coloured label needs data.colors, a file with the colour of each class")
        for index, color in enumerate([] if known else self.colors or []):
            if (first := known.setdefault(color, index)) != index:
                raise DataError(f"coloured labels cannot tell classes {first} and {index} apart: both are {color}")
        known |= self._parsed.colors
        codes = sorted((red << 16 | green << 8 | blue, index) for (red, green, blue), index in known.items())
        return np.array([code for code, _ in codes], np.int32), np.array([index for _, index in codes], np.int16)

    def _describe_colors(self, unknown: NDArray[np.uint8]) -> str:
        """The most frequent of the colours (N, 3) that no class has, and the class that is nearest."""
        codes, classes = self._color_codes
        values, counts = np.unique(unknown, axis=0, return_counts=True)
        color = tuple(values[counts.argmax()].tolist())
        known = np.array([_decode_color(int(code)) for code in codes])
        nearest = int(((known - color) ** 2).sum(1).argmin())
        more = f" and {len(values) - 1} other colours in {len(unknown) - counts.max()}" if len(values) > 1 else ""
        return (
            f"colour {color} in {counts.max()} pixels{more} is that of no class; "
            f"the nearest is {tuple(known[nearest].tolist())} of class {classes[nearest]}; "
            f'"data.remap={{{" ".join(map(str, color))}: 255}}" ignores a colour'
        )


def read_pixels(path: Path, expand_palette: bool = False, oriented: bool = True) -> NDArray[Any]:
    """Read a label file as it is: values uint8 or uint16 (H, W), or colours uint8 (H, W, 3).

    Args:
        expand_palette: take the colours of palette and grey files too, in place of their indices.
        oriented: turn it as its EXIF orientation says.

    Raises:
        DataError: the file is missing, not whole, lossy, animated, partly transparent or no image.
    """
    image, bits = _open(path, oriented)
    if image.mode in ("LA", "PA", "RGBA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise DataError(f"{path}: is transparent in places, which means no class; save the label without alpha")
        image = image.convert("RGB") if image.mode == "RGBA" else image.getchannel(0)
    if image.mode == "RGB" or (expand_palette and not image.mode.startswith("I")):
        return np.asarray(image.convert("RGB"))
    pixels = np.asarray(image)
    if image.mode == "L" and bits in (2, 4):
        pixels = pixels // (255 // (2**bits - 1))  # Pillow spreads such grey values over 0..255
    if image.mode.startswith("I"):
        least, last = int(pixels.min()), int(pixels.max())
        if least < 0 or last > _LAST_VALUE:
            raise DataError(f"{path}: label value {min(least, 0) or last}; labels hold 0 to {_LAST_VALUE}")
        return pixels.astype(np.uint16)
    return pixels.astype(np.uint8)


def _open(path: Path, oriented: bool) -> tuple[Image.Image, int]:
    """The decoded image and the bits of its channels in the file."""
    content = read_content(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and of odd metadata
            image = Image.open(io.BytesIO(content))
            bits = _bits(image, content)
            if reason := _refusal(image, content, bits):
                raise DataError(f"{path}: {reason}")
            image.load()
            if oriented:
                ImageOps.exif_transpose(image, in_place=True)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnreadableError(f"{path}: is not an image that Pillow can read; save labels as PNG") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{path}: has more pixels than Pillow reads ({most}); cut image and label up") from None
    except Exception as error:  # Pillow's readers raise what they come across in a damaged file
        raise UnreadableError(f"{path}: is damaged or not whole ({error})") from None
    return image, bits


def _refusal(image: Image.Image, content: bytes, bits: int) -> str | None:
    """Why a file cannot hold a label."""
    compression = str(image.info.get("compression", ""))
    if image.format in ("JPEG", "MPO") or (image.format == "TIFF" and "jpeg" in compression):
        return "a JPEG label: JPEG is lossy, its pixels are no longer the values drawn; save labels as PNG"
    if image.format == "WEBP" and b"VP8L" not in content:
        return "a label in lossy WebP, whose pixels are no longer the values drawn; save labels as PNG"
    if image.format not in _FORMATS:
        return f"labels are read from {', '.join(_FORMATS)}, not from {image.format}; save them as PNG"
    if (frames := getattr(image, "n_frames", 1)) > 1:
        return f"a label must be one image, the file holds {frames}"
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "LA", "PA", "RGB", "RGBA"):
        return f"a label must hold integers or RGB colours, got pixels of the kind {image.mode!r}"
    if len(image.getbands()) > 1 and bits > 8:
        return "a label of several channels must have 8 bits in each"
    return None


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits of a channel in the file; 8 where its format does not tell."""
    if image.format == "PNG":
        return content[24]  # of the header, which comes first
    if image.format == "TIFF":
        return int(image.tag_v2.get(258, (1,))[0])  # type: ignore[attr-defined]
    return 8


def _hint_at_grey(pixels: NDArray[Any]) -> str:
    if (pixels != pixels[..., :1]).any():
        return ""
    return "; its three channels are equal: if they are values, not colours, save them as one channel"


def _decode_color(code: int) -> Color:
    return code >> 16, code >> 8 & 255, code & 255


def _first(values: Sequence[int], count: int = 5) -> str:
    return ", ".join(map(str, values[:count])) + (", ..." if len(values) > count else "")


def _ranges(values: Collection[int]) -> str:
    """``0..18 and 255`` for these numbers."""
    numbers = sorted(values)
    starts = [number for number in numbers if number - 1 not in values]
    ends = [number for number in numbers if number + 1 not in values]
    parts = [str(a) if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True)]
    return re.sub(r", (\S+)$", r" and \1", ", ".join(parts))
