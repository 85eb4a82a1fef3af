"""Which images a prediction reads and which files it writes, settled before the first is written."""

import glob
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pspnet_fast.data.images import SUFFIXES

ENDS = {
    "labels": ".png",
    "palette": "_color.png",
    "overlay": "_overlay.png",
    "confidence": "_confidence.png",
    "probabilities": "_probabilities.npy",
}
"""What can be written of an image, and how its file's name ends."""
DEFAULT = ("labels", "palette", "overlay")
VIDEO_ENDS = {"labels": ".mkv", "palette": "_color.mp4", "overlay": "_overlay.mp4", "confidence": "_confidence.mkv"}
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
"""Files that count as videos."""


@dataclass(frozen=True)
class Task:
    """An image, or a video, and the files of its prediction by what is in them."""

    image: Path
    results: dict[str, Path]

    @property
    def is_video(self) -> bool:
        return _is_video(self.image)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def plan(
    arguments: Sequence[Path],
    out: Path,
    outputs: Sequence[str] = DEFAULT,
    *,
    overwrite: bool = False,
    failed: list[Exception] | None = None,
) -> list[Task]:
    """The images and videos that files, folders and patterns name, and where their results go.

    A file's results lie in ``out``, those of a folder's images in ``out`` as in the folder, which is searched to any
    depth, hidden files, links to folders and ``out`` itself left out. An argument that is neither file nor folder is a
    pattern (``*``, ``?``, ``[]``, ``**``). An image that is named twice is taken once.

    Args:
        outputs: what is written of each: keys of ``ENDS``.
        failed: takes the errors of arguments and folders that cannot be used; the others are planned all the same.
            Without it they are raised.

    Raises:
        FileNotFoundError: an argument names nothing.
        OSError: a folder cannot be read.
        ValueError: see :func:`check_results`; a folder without images; probabilities of a video.
    """
    found: dict[str, tuple[Path, Path]] = {}

    def fail(error: Exception) -> None:
        if failed is None:
            raise error
        failed.append(error)

    for argument in arguments:
        try:
            images = _images(argument, out, fail)
        except (FileNotFoundError, ValueError) as error:
            fail(error)
            continue
        for image, name in images:
            found.setdefault(_place(image), (image, name))
    tasks = []
    for image, name in found.values():
        ends = VIDEO_ENDS if _is_video(image) else ENDS
        if missing := [output for output in outputs if output not in ends]:
            raise ValueError(f"{image}: {missing[0]} are written of images only, not of videos, which need gigabytes")
        stem = out / name.parent / name.stem
        tasks.append(Task(image, {output: stem.with_name(stem.name + ends[output]) for output in outputs}))
    results = [(task.image, path) for task in tasks for path in task.results.values()]
    check_results(results, overwrite=overwrite)
    return tasks


def check_results(
    results: Sequence[tuple[Path, Path]], *, inputs: Iterable[Path] = (), overwrite: bool = False
) -> None:
    """Refuse to write results over an input, over each other, or, unless ``overwrite``, over a file that exists.

    Names that differ in case alone count as one, since file systems differ in that.

    Args:
        results: pairs of an image and a file that is written for it.
        inputs: further files that must stay.

    Raises:
        ValueError: the first clash; the message names the files and the way out.
    """
    sources = {image for image, _ in results} | set(inputs)
    read = {_key(path): image for image in sources for path in (_place(image), os.path.realpath(image))}
    written: dict[str, Path] = {}
    for image, result in results:
        key = _key(_place(result))
        if key in read:
            raise ValueError(
                f"the result {result} of {image} would overwrite the image {read[key]}; choose another folder for --out"
            )
        if key in written:
            raise ValueError(
                f"{written[key]} and {image} would both be written to {result}; rename one, predict them into "
                "different folders, or name their common folder, whose structure the results keep"
            )
        written[key] = image
    exist = [result for _, result in results if os.path.lexists(result)]
    if exist and not overwrite:
        more = f" and {len(exist) - 1} more results exist" if len(exist) > 1 else " exists"
        raise ValueError(f"{exist[0]}{more}: replace with --overwrite, or choose another --out")


def _images(argument: Path, out: Path, fail: Callable[[OSError], None]) -> list[tuple[Path, Path]]:
    """Images of one argument, each with the name that its results take after."""
    if argument.is_dir():
        return _images_of_folder(argument, out, fail)
    if os.path.lexists(argument):
        return [(argument, Path(argument.name))]
    matches = sorted(map(Path, glob.glob(str(argument), recursive=True))) if glob.has_magic(str(argument)) else []
    files = [path for path in matches if path.is_file()]
    if not files:
        raise FileNotFoundError(f"no image {argument}")
    return [(path, Path(path.name)) for path in files]


def _images_of_folder(folder: Path, out: Path, fail: Callable[[OSError], None]) -> list[tuple[Path, Path]]:
    results = os.path.realpath(out)
    images = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(parent) == results and Path(parent) != folder:
            folders.clear()
            continue
        for name in sorted(files):
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES and not name.startswith("."):
                images.append((path, path.relative_to(folder)))
    if not images:
        raise ValueError(f"{folder}: no image in this folder ({', '.join(sorted(SUFFIXES))}), and no video")
    return images


def _place(path: Path) -> str:
    """Where the file itself lies, be it a link: links in its folder's path are followed, its own is not."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()
