"""What several commands share: types of their arguments, data sets of a configuration, a checkpoint's model."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # these need the extras of pspnet_fast[train]; the commands import them when they run
    from pspnet_fast.data.list_dataset import ListDataset
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.config import DataConfig


class _Path(click.Path):
    """A path in which ``~`` is the home folder, also where a shell leaves it: ``--out=~/runs``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value if os.path.lexists(value) else os.path.expanduser(value), param, ctx)


ANY = _Path(path_type=Path)
FILE = _Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = _Path(file_okay=False, path_type=Path)


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
    from pspnet_fast.data.lists import read_names, spread_colors

    root = data_path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: no folder {root}; name it on the command line: data.root=FOLDER")
    names = read_names(data_path(data, "names"))
    colors = _given_colors(data, len(names))
    if colors is None:
        click.echo(f"no {data_path(data, 'colors')}: the classes get colours that differ well", err=True)
    return names, colors or spread_colors(len(names))


def _given_colors(data: "DataConfig", classes: int) -> list[tuple[int, int, int]] | None:
    from pspnet_fast.data.lists import read_colors
    from pspnet_fast.training.config import DataConfig

    path = data_path(data, "colors")
    missing = data.colors == DataConfig.colors and not path.exists()  # a file that was asked for must be there
    return None if missing else read_colors(path, classes)


def list_dataset(data: "DataConfig", list_name: str, classes: int, transform: Any, seed: int = 0) -> "ListDataset":
    """The pairs of ``data.train_list`` or ``data.val_list``, whose field ``list_name`` is."""
    from pspnet_fast.data.labels import LabelReader
    from pspnet_fast.data.list_dataset import ListDataset

    labels = LabelReader(classes, data.labels, data.remap, _given_colors(data, classes))
    return ListDataset(data_path(data), data_path(data, list_name), labels, transform, seed, data.orientation)


def validation_set(data: "DataConfig", classes: int, mean: Sequence[float], std: Sequence[float]) -> "ListDataset":
    from pspnet_fast.data.transforms import EvalTransform

    return list_dataset(data, "val_list", classes, EvalTransform(mean, std, data.val_crop))


def load_predictor(checkpoint: Path, device: str) -> "Predictor":
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.checkpoint import load_checkpoint
    from pspnet_fast.training.evaluation import choose_device

    return Predictor.from_checkpoint(load_checkpoint(checkpoint), choose_device(device))
