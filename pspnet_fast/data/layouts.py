"""Data sets by the folders in which they are published, and any pair of folders: which label belongs to which image.

A pattern is a path below the root of the data with two variables: ``{split}``, the part of the data, and ``{name}``,
what an image and its label have in common, folders included. ``{name}.*`` stands for every suffix of an image.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.data.images import SUFFIXES
from pspnet_fast.data.lists import Color, read_lines

LISTS = "lists"  # no layout: pairs are written down in list files
Patterns = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its files.

    Attributes:
        images: patterns; an image that several match is that of the first.
        labels: likewise, by the convention (``data.labels``) of the files; the first is the default.
        splits: names of the parts for training and validation.
        classes: name of the file of its classes in the package; None where the user names them.
        lists: files with a name a line, which choose among the images; the first that exists.
        chosen: whether a name is in a split that no file lists; it raises ValueError for a split that is none.
        rest: a split that is, where no file lists it, all labels but those of another.
        remap: what data.remap is where the user gives none.
    """

    images: Patterns
    labels: Mapping[str, Patterns]
    splits: tuple[str, str]
    classes: str | None = None
    lists: Patterns = ()
    chosen: Callable[[str, str], bool] | None = None
    rest: tuple[str, str] | None = None
    remap: Mapping[str, int] = field(default_factory=dict)

    @property
    def convention(self) -> str:
        """What the values of its label files mean."""
        return next(iter(self.labels))


def _camvid_split(name: str, split: str) -> bool:
    """Whether a frame is in a part of the split 367 / 101 / 233, which follows the sequences.

    Of 0016E5 the frames taken at 15 Hz validate; Seq05VD and the second half of 0001TP test (SegNet tutorial).
    """
    sequence, _, digits = name.rpartition("_")
    frame = int("".join(filter(str.isdecimal, digits)) or 0)
    if sequence == "0016E5" and 7959 <= frame <= 8159:
        part = "val"
    else:
        part = "test" if sequence == "Seq05VD" or (sequence == "0001TP" and frame > 8520) else "train"
    if split not in ("train", "val", "test"):
        raise ValueError(f"CamVid has the splits train, val and test, got {split!r}")
    return part == split


_VOC_LISTS = ("ImageSets/Segmentation/{split}.txt",)
_GTS = ("gtFine", "gtCoarse")
_CAMVID_IMAGES = ("701_StillsRaw_full/{name}.png", "images/{name}.png")
_CAMVID_LABELS = ("LabeledApproved_full/{name}_L.png", "labels/{name}_L.png")

LAYOUTS = {
    "cityscapes": Layout(
        ("leftImg8bit/{split}/{name}_leftImg8bit.png",),
        {
            convention: tuple(f"{folder}/{{split}}/{{name}}_{folder}_{kind}.png" for folder in _GTS)
            for convention, kind in (("cityscapes", "labelIds"), ("index", "labelTrainIds"), ("color", "color"))
        },
        ("train", "val"),
        "cityscapes",
    ),
    "ade20k": Layout(
        ("images/{split}/{name}.jpg",),
        {"ade20k": ("annotations/{split}/{name}.png",)},
        ("training", "validation"),
        "ade20k",
    ),
    "voc": Layout(
        ("JPEGImages/{name}.jpg",),
        {"voc": ("SegmentationClass/{name}.png",)},
        ("train", "val"),
        "voc",
        _VOC_LISTS,
    ),
    "voc_aug": Layout(
        ("JPEGImages/{name}.jpg",),
        {"voc": ("SegmentationClassAug/{name}.png", "SegmentationClass/{name}.png")},
        ("train_aug", "val"),
        "voc",
        _VOC_LISTS,
        rest=("train_aug", "val"),
    ),
    "camvid": Layout(
        ("{split}/{name}.png",),
        {"camvid": ("{split}annot/{name}.png",)},
        ("train", "val"),
        "camvid",
    ),
    "camvid_full": Layout(
        _CAMVID_IMAGES,
        {"camvid": _CAMVID_LABELS},
        ("train", "val"),
        "camvid",
        chosen=_camvid_split,
    ),
    "camvid_31": Layout(
        _CAMVID_IMAGES,
        {"color": _CAMVID_LABELS},
        ("train", "val"),
        "camvid_31",
        chosen=_camvid_split,
        remap={"0 0 0": IGNORE_INDEX},
    ),
    "cocostuff": Layout(
        ("images/{split}/{name}.jpg", "{split}/{name}.jpg"),
        {
            "cocostuff": ("annotations/{split}/{name}.png", "stuffthingmaps/{split}/{name}.png"),
            "index": ("annotations/{split}/{name}_labelTrainIds.png",),
        },
        ("train2017", "val2017"),
        "cocostuff",
    ),
    "cocostuff10k": Layout(  # as mmsegmentation's converter writes it: 0 is unlabelled
        ("images/{split}/{name}.jpg",),
        {"from_one": ("annotations/{split}/{name}_labelTrainIds.png",)},
        ("train2014", "test2014"),
        "cocostuff",
    ),
    "folders": Layout(
        ("images/{split}/{name}.*", "{split}/images/{name}.*"),
        {"index": ("labels/{split}/{name}.*", "{split}/labels/{name}.*")},
        ("train", "val"),
        lists=("{split}.txt",),
    ),
}


@dataclass
class Pairs:
    """Images with their labels, in the order of their names.

    Attributes:
        paths: image and label.
        no_label, no_image: images and labels that belong to the data and lack the other.
        unused: labels beside them, of no image, where no list chooses among the images.
    """

    paths: list[tuple[Path, Path]] = field(default_factory=list)
    no_label: list[Path] = field(default_factory=list)
    no_image: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)


def find_pairs(root: Path, layout: Layout, split: str, convention: str) -> Pairs:
    """The images of a split and their labels; of several splits, joined by "+", one after the other.

    Raises:
        FileNotFoundError: the root is no folder, or it holds no image of the split.
        ValueError: a pattern without ``{name}``, two images of one name, a list that names no image, splits that
            nothing tells apart, or a layout without labels of this convention.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: no folder {root}")
    if convention not in layout.labels:
        allowed = ", ".join(layout.labels)
        raise ValueError(f"data.labels must be one of {allowed} for this data.layout, got {convention!r}")
    found = Pairs()
    for part in split.split("+"):
        images = _match(root, layout.images, part)
        labels = _match(root, layout.labels[convention], part)
        names, listed = _names(root, layout, part, images, labels)
        if not names:
            where = " or ".join(pattern.format(split=part, name="*") for pattern in layout.images)
            raise FileNotFoundError(f"{root}: no image {where}")
        for name in names:
            if name in images and name in labels:
                found.paths.append((images[name], labels[name]))
            elif name in images:
                found.no_label.append(images[name])
            else:
                found.no_image.append(labels[name])
        if not listed:
            found.unused += _without_image(root, layout, part, convention, images, labels)
    return found


def _without_image(
    root: Path, layout: Layout, split: str, convention: str, images: Mapping[str, Path], labels: Mapping[str, Path]
) -> list[Path]:
    """Labels of no image, but for files that are labels of another convention."""
    alone = [path for name, path in labels.items() if name not in images]
    others = [patterns for other, patterns in layout.labels.items() if other != convention] if alone else []
    known = {path for patterns in others for path in _match(root, patterns, split).values()}
    return [path for path in alone if path not in known]


def _names(
    root: Path, layout: Layout, split: str, images: Mapping[str, Path], labels: Mapping[str, Path]
) -> tuple[Sequence[str], bool]:
    """The names of a split in order, and whether something chose them among the images."""
    if layout.chosen:
        return [name for name in images if layout.chosen(name, split)], True
    files = [root / pattern.format(split=split) for pattern in layout.lists]
    if (file := next((path for path in files if path.is_file()), None)) is not None:
        names = []
        for number, line in read_lines(file):
            # "name", a file of that name, or the image first of "/JPEGImages/name.jpg /SegmentationClassAug/name.png"
            readings = (line, os.path.splitext(line)[0], Path(line.split()[0]).stem)
            name = next((name for name in readings if name in images or name in labels), None)
            if name is None:
                raise ValueError(f"{file}:{number}: no image or label of the name {line!r} in {root}")
            names.append(name)
        return names, True
    if layout.rest and split == layout.rest[0]:
        held_out = set(_names(root, layout, layout.rest[1], images, labels)[0])
        return [name for name in labels if name not in held_out], True
    if not any("{split}" in pattern for pattern in layout.images):
        raise FileNotFoundError(f"no list {' or '.join(map(str, files))}, which would tell the images of {split!r}")
    return list(images), False


def _match(root: Path, patterns: Iterable[str], split: str) -> dict[str, Path]:
    """Files by the name that they have in common with others, sorted; of several patterns the first counts."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        for name, path in _files(root, pattern, split):
            found.setdefault(name, path)
    return dict(sorted(found.items()))


def _files(root: Path, pattern: str, split: str) -> Iterator[tuple[str, Path]]:
    if pattern.count("{name}") != 1:
        raise ValueError(f"a pattern of files must hold {{name}} once, got {pattern!r}")
    before, after = pattern.replace("{split}", split).split("{name}")
    folder, _, start = before.rpartition("/")
    any_suffix = after.endswith(".*")
    end = re.escape(after.removesuffix(".*")) + (r"(?P<suffix>\.[^./]+)" if any_suffix else "")
    form = re.compile(rf"{re.escape(start)}(?P<name>.+){end}")
    seen: dict[str, Path] = {}
    for parent, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            path = Path(parent, file)
            match = form.fullmatch(path.relative_to(root / folder).as_posix())
            if not match or file.startswith(".") or (any_suffix and match["suffix"].lower() not in SUFFIXES):
                continue
            name = match["name"]
            if (other := seen.setdefault(name, path)) != path:
                raise ValueError(f"{other} and {path} have one name: which of them is meant?")
            yield name, path


def read_published_classes(name: str) -> tuple[list[str], list[Color] | None]:
    """Names and colours of a data set's classes by index; None where it has no colours of its own."""
    text = resources.files("pspnet_fast.data").joinpath("classes", f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    if not lines[0][0].isdecimal():
        return lines, None
    rows = [line.split(" ", 3) for line in lines]
    return [row[3] for row in rows], [(int(row[0]), int(row[1]), int(row[2])) for row in rows]
