"""The text files of a data folder: lists of images and labels, names and colours of classes."""

import csv
from collections.abc import Iterator
from pathlib import Path

from pspnet_fast.data import IGNORE_INDEX

Color = tuple[int, int, int]


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        FileNotFoundError: no such file.  ValueError: it is not text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: is not UTF-8; save the file as text in UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path}: is not UTF-8 (it holds zero bytes); save the file as text in UTF-8")
    return text


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and contents of the lines that are not blank, without blanks around them; raises as :func:`read_text`."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return ((number, line.strip()) for number, line in lines if line.strip())


def read_names(path: Path) -> list[str]:
    """Class names, one a line, by index.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no name in it, more than 255, or one twice.
    """
    lines: dict[str, int] = {}
    for number, name in read_lines(path):
        if (first := lines.setdefault(name, number)) != number:
            raise ValueError(f"{path}:{number}: the name {name!r} stands in line {first} already")
    if not 1 <= len(lines) <= IGNORE_INDEX:
        raise ValueError(f"{path}: must hold 1 to {IGNORE_INDEX} class names, has {len(lines)}")
    return list(lines)


def read_colors(path: Path, classes: int) -> list[Color]:
    """Class colours, ``R G B`` (0..255) a line, by index; commas may separate them too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another number of lines than ``classes``, or a line that is no colour.
    """
    colors = []
    for number, line in read_lines(path):
        try:
            red, green, blue = map(int, line.replace(",", " ").split())
        except ValueError:
            raise ValueError(f"{path}:{number}: must be 'R G B', got {line!r}") from None
        if not all(0 <= value <= 255 for value in (red, green, blue)):
            raise ValueError(f"{path}:{number}: colours lie in 0..255, got {line!r}")
        colors.append((red, green, blue))
    if len(colors) != classes:
        raise ValueError(f"{path}: has {len(colors)} colours for {classes} classes")
    return colors


def spread_colors(classes: int) -> list[Color]:
    """Colours for classes that have none: each the farthest from those before it, from black (ignored) and white."""
    levels = (0, 36, 73, 109, 146, 182, 219, 255)
    space = [(red, green, blue) for red in levels for green in levels for blue in levels]

    def distance(a: Color, b: Color) -> int:  # green counts most for the eye, blue least
        return 3 * (a[0] - b[0]) ** 2 + 4 * (a[1] - b[1]) ** 2 + 2 * (a[2] - b[2]) ** 2

    nearest = [min(distance(color, taken) for taken in ((0, 0, 0), (255, 255, 255))) for color in space]
    colors: list[Color] = []
    for _ in range(classes):
        colors.append(space[max(range(len(space)), key=nearest.__getitem__)])
        nearest = [min(old, distance(color, colors[-1])) for old, color in zip(nearest, space, strict=True)]
    return colors


def read_list(root: Path, list_file: Path, failed: list[Exception] | None = None) -> list[tuple[Path, Path]]:
    """Pairs of a list file with lines ``IMAGE LABEL``, both relative to ``root``; every file must exist.

    A tab, a comma or blanks separate the two; names that hold the separator stand in double quotes.

    Args:
        failed: takes the errors of single lines, which are then left out. Without it the first is raised.

    Raises:
        FileNotFoundError: the list or a file that it names is missing.
        ValueError: a line without two names, or no line at all.
    """
    pairs, lines = [], list(read_lines(list_file))
    for number, line in lines:
        try:
            pairs.append(_pair(root, line, f"{list_file}:{number}"))
        except (FileNotFoundError, ValueError) as error:
            if failed is None:
                raise
            failed.append(error)
    if not lines:
        raise ValueError(f"{list_file}: names no image")
    return pairs


def _pair(root: Path, line: str, place: str) -> tuple[Path, Path]:
    readings = [(_locate(root, image), _locate(root, label)) for image, label in _separate(line)]
    if not readings:
        raise ValueError(
            f"{place}: must be 'IMAGE LABEL', got {line!r}; "
            "where a name holds blanks, put a tab or comma between the two, or each in double quotes"
        )
    # Where a line can be read in several ways, the files that exist decide.
    image, label = next((pair for pair in readings if all(path.is_file() for path in pair)), readings[0])
    for path in (image, label):
        if path.is_dir():
            raise FileNotFoundError(f"{place}: {path} is a folder, not a file")
        if not path.is_file():
            raise FileNotFoundError(f"{place}: no file {path}")
    return image, label


def _separate(line: str) -> list[tuple[str, str]]:
    """All ways to read a line as two names."""
    readings = []
    for separator in "\t, ":
        fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        if len(fields) == 2 and all(name.strip() for name in fields):
            readings.append((fields[0].strip(), fields[1].strip()))
    if len(blank := line.split()) == 2 and '"' not in line:
        readings.append((blank[0], blank[1]))
    return readings


def _locate(root: Path, name: str) -> Path:
    path = root / name
    # Lists written on Windows.
    return root / name.replace("\\", "/") if "\\" in name and not path.exists() else path
