"""Text in pictures: fonts that have the letters of class names, matplotlib's DejaVu Sans or one of this machine."""

import functools
import re
import unicodedata
import warnings
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont


class Font(NamedTuple):
    """A font's name and file."""

    name: str
    file: str


_FIRST = Font("DejaVu Sans", str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")))
# Fonts that draw a box for every letter, come in one size, or call glyphs by numbers of their own.
_UNFIT = re.compile(r"LastResort|Emoji|NonUni|^cm(b|ex|mi|r|ss|sy|ti|tt)10")
_warned: list[str] = []  # the texts that it was warned of


def drawable(text: str) -> str:
    """The text with the letters that no font has as their codes, of the first of which it warns."""
    letters = unicodedata.normalize("NFC", text)
    missing = [letter for letter in letters if not _font_of(letter)]
    if missing and not _warned:
        _warned.append(text)
        warnings.warn(
            f"no font of this machine has all letters of {text!r} (U+{ord(missing[0]):04X}): pictures show their "
            "codes. Fonts such as Noto Sans, or Noto Sans CJK for Chinese, Japanese and Korean, have them",
            stacklevel=2,
        )
    return "".join(letter if _font_of(letter) else letter.encode("unicode_escape").decode() for letter in letters)


def families(texts: Iterable[str]) -> list[str]:
    """Names of the fonts that these drawable texts need, for matplotlib to fall back on in this order."""
    fonts = [_FIRST, *(font for letter in sorted(set("".join(texts))) if (font := _font_of(letter)))]
    return list(dict.fromkeys(font.name for font in fonts))


def text_width(text: str, size: int) -> int:
    """Width of a drawable text in pixels, in letters of this size."""
    return round(sum(_truetype(font, size).getlength(part) for font, part in _parts(text)))


def write(canvas: NDArray[Any], text: str, left: int, baseline: int, size: int) -> None:
    """Write a drawable text in black into a picture uint8 (H, W, 3)."""
    image = Image.fromarray(canvas)
    draw, at = ImageDraw.Draw(image), float(left)
    for font, part in _parts(text):
        draw.text((at, baseline), part, "black", _truetype(font, size), anchor="ls")
        at += _truetype(font, size).getlength(part)
    canvas[:] = image


def _parts(text: str) -> list[tuple[Font, str]]:
    """Runs of letters of one font."""
    return [(font, "".join(run)) for font, run in groupby(text, lambda letter: _font_of(letter) or _FIRST)]


@functools.cache
def _truetype(font: Font, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.file, size)


@functools.cache
def _font_of(letter: str) -> Font | None:
    """The first font that has the letter."""
    if ord(letter) in _letters(_FIRST):
        return _FIRST
    return next((font for font in _other_fonts() if ord(letter) in _letters(font)), None)


@functools.cache
def _other_fonts() -> list[Font]:
    """The fonts that matplotlib finds, upright ones of usual weight and without serifs first."""
    from matplotlib.font_manager import fontManager

    def order(entry: Any) -> tuple[Any, ...]:
        weight = abs(entry.weight - 400) if isinstance(entry.weight, int) else 0
        return entry.style != "normal", weight, "Sans" not in entry.name, entry.name, entry.fname

    fonts = [Font(entry.name, entry.fname) for entry in sorted(fontManager.ttflist, key=order)]
    return [font for font in fonts if not _UNFIT.search(Path(font.file).name)]


@functools.cache
def _letters(font: Font) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(font.file).get_charmap())
    except (OSError, RuntimeError):  # removed or damaged
        return frozenset()
