"""What several commands share: types of their arguments, data sets of a configuration, a checkpoint's model."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # these need the extras of pspnet_fast[train]; the commands import them when they run
    from pspnet_fast.data.labels import LabelReader
    from pspnet_fast.data.layouts import Pairs
    from pspnet_fast.data.list_dataset import PairDataset
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.inference.protocol import Protocol
    from pspnet_fast.training.config import DataConfig


class _Path(click.Path):
    """A path in which ``~`` is the home folder, also where a shell leaves it: ``--out=~/runs``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value if os.path.lexists(value) else os.path.expanduser(value), param, ctx)


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    def __init__(self, kind: type, name: str) -> None:
        self._kind, self.name = kind, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"must be {self.name.lower()}, got {value!r}", param, ctx)


ANY = _Path(path_type=Path)
FILE = _Path(exists=True, dir_okay=False, path_type=Path)
CHECKPOINT = _Path(exists=True, path_type=Path)  # a file, or the folder of a model
FOLDER = _Path(file_okay=False, path_type=Path)
NEW_FILE = _Path(dir_okay=False, path_type=Path)


def data_path(data: "DataConfig", name: str = "") -> Path:
    """The folder ``data.root``, or the file in it that this field names.

    Raises:
        ValueError: a variable in the names is not set.
    """
    root = Path(_expanded("root", data.root, Path()))
    return root / _expanded(name, getattr(data, name), root) if name else root


def _expanded(field: str, text: str, folder: Path) -> str:
    """The text with ``~`` and environment variables replaced, unless a file of just this name exists."""
    if (folder / text).exists():
        return text
    for name in re.findall(r"\$(\w+|\{\w+\})", text):
        if name.strip("{}") not in os.environ:
            raise ValueError(f"data.{field}={text}: the environment variable {name.strip('{}')} is not set")
    return os.path.expandvars(os.path.expanduser(text))


def read_classes(data: "DataConfig") -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours: of the files, else as the layout is published, else colours that differ well."""
    from pspnet_fast.data.layouts import LAYOUTS, read_published_classes
    from pspnet_fast.data.lists import read_names, spread_colors

    root = data_path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: no folder {root}; name it on the command line: data.root=FOLDER")
    published = LAYOUTS[data.layout].classes if data.layout else None
    if published and not _given(data, "names"):
        names, known = read_published_classes(published)
        return names, _given_colors(data, len(names)) or known or spread_colors(len(names))
    names = read_names(data_path(data, "names"))
    colors = _given_colors(data, len(names))
    if colors is None:
        click.echo(f"no {data_path(data, 'colors')}: the classes get colours that differ well", err=True)
    return names, colors or spread_colors(len(names))


def _given_colors(data: "DataConfig", classes: int) -> list[tuple[int, int, int]] | None:
    from pspnet_fast.data.lists import read_colors

    return read_colors(data_path(data, "colors"), classes) if _given(data, "colors") else None


def _given(data: "DataConfig", field: str) -> bool:
    """Whether the file of this field is there or was asked for: one that was asked for must be there."""
    from pspnet_fast.training.config import DataConfig

    return getattr(data, field) != getattr(DataConfig, field) or data_path(data, field).exists()


def label_reader(data: "DataConfig", classes: int) -> "LabelReader":
    """What reads the label files: the layout's own colours are known where no file has others."""
    from pspnet_fast.data.labels import LabelReader
    from pspnet_fast.data.layouts import LAYOUTS, read_published_classes

    colors: Sequence[Any] | None = _given_colors(data, classes)
    published = LAYOUTS[data.layout].classes if data.layout else None
    if colors is None and published and not _given(data, "names"):
        colors = read_published_classes(published)[1]
    return LabelReader(classes, data.labels, data.remap, colors)


def published_pairs(data: "DataConfig", part: str) -> tuple["Pairs", str]:
    """The pairs of ``part`` ("train" or "val") of ``data.layout``, and a name for where they come from."""
    from pspnet_fast.data.layouts import LAYOUTS, find_pairs

    assert data.layout is not None
    layout = LAYOUTS[data.layout]
    # A remap tells the meaning of the values that the data set was published with.
    own = (
        layout.convention
        if data.labels not in layout.labels or (data.labels == "index" and data.remap)
        else data.labels
    )
    patterns = (data.label_files,) if data.label_files else layout.labels[own]
    free = data.label_files or data.layout == "folders" or data.remap
    labels = {data.labels: patterns} if free else layout.labels
    layout = replace(layout, images=(data.images,) if data.images else layout.images, labels=labels)
    split = getattr(data, f"{part}_split") or layout.splits[part == "val"]
    return find_pairs(data_path(data), layout, split, data.labels), f"{data_path(data)} ({split})"


def pair_dataset(
    data: "DataConfig",
    part: str,
    classes: int,
    transform: Any,
    seed: int = 0,
    failed: list[Exception] | None = None,
) -> "PairDataset":
    """The pairs of ``part`` ("train" or "val"), of the layout or of the list file.

    Args:
        failed: takes the errors of files that have no counterpart, which are left out; without it the first is raised.

    Raises:
        FileNotFoundError: an image has no label.
    """
    from pspnet_fast.data.list_dataset import ListDataset, PairDataset

    labels = label_reader(data, classes)
    training = part == "train"
    more: dict[str, Any] = {"cache_bytes": int(data.cache_gb * 1e9) if training and failed is None else 0}
    if data.unreadable == "skip":
        more["unreadable"] = "replace" if training else "blank"
    if data.layout is None:
        list_file = data_path(data, f"{part}_list")
        return ListDataset(data_path(data), list_file, labels, transform, seed, data.orientation, failed, **more)
    pairs, source = published_pairs(data, part)
    for alone, what, other in ((pairs.no_label, "image", "label"), (pairs.no_image, "label", "image")):
        if failed is not None:
            failed += [FileNotFoundError(f"{path}: this {what} has no {other}") for path in alone]
        elif alone:
            others = f" and {len(alone) - 1} more {what}s have none" if len(alone) > 1 else ""
            raise FileNotFoundError(f"{alone[0]}: this {what} has no {other}{others}; pspnet-fast check-data names all")
    dataset = PairDataset(pairs.paths, source, labels, transform, seed, data.orientation, **more)
    dataset.unused = pairs.unused
    return dataset


def skipped_text(*datasets: "PairDataset") -> str:
    """What was passed over of data sets, as a sentence; empty if nothing was."""
    paths = [str(image) for dataset in datasets for image, _ in dataset.skipped]
    others = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"skipped {len(paths)} unreadable pairs: {', '.join(paths[:3])}{others}" if paths else ""


def validation_set(data: "DataConfig", classes: int, mean: Sequence[float], std: Sequence[float]) -> "PairDataset":
    from pspnet_fast.data.transforms import EvalTransform

    return pair_dataset(data, "val", classes, EvalTransform(mean, std, data.val_crop))


def chosen_protocol(preset: str, changes: Mapping[str, Any]) -> "Protocol":
    """A preset with what options change of it: None changes nothing, a crop of one number is both.

    Raises:
        click.UsageError: an option has a value that the protocol does not allow; the message names it.
    """
    from pspnet_fast.inference.protocol import Protocol

    given = {name: value for name, value in changes.items() if value is not None}
    if len(given.get("crop", ())) == 1:
        given["crop"] *= 2
    try:
        return Protocol.of(preset, **given)
    except ValueError as error:
        raise click.UsageError(f"--{str(error).replace('_', '-', 1)}") from None


def load_predictor(checkpoint: Path, device: str) -> "Predictor":
    from pspnet_fast.inference.predict import Predictor

    return Predictor.from_checkpoint(checkpoint, device)


OPTIMIZE = click.option(
    "--optimize/--no-optimize",
    default=None,
    help="Fold and pack the weights first: faster, the same results but for rounding. By default on a CPU.",
)


def optimized(predictor: "Predictor", wanted: bool | None) -> "Predictor":
    """The predictor, its model optimized if wanted; None for where it is known to pay, on a CPU."""
    if wanted is None:
        wanted = predictor.device.type == "cpu"
    return predictor.optimized() if wanted else predictor
