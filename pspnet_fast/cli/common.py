"""What several commands share: types of their arguments, data sets of a configuration, a checkpoint's model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # these need the extras of pspnet_fast[train]; the commands import them when they run
    from pspnet_fast.data.list_dataset import ListDataset
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.config import DataConfig

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


def read_classes(data: "DataConfig") -> tuple[list[str], list[tuple[int, int, int]]]:
    from pspnet_fast.data.lists import read_names, spread_colors

    root = Path(data.root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: no folder {root}; name it on the command line: data.root=FOLDER")
    names = read_names(root / data.names)
    colors = _given_colors(data, len(names))
    if colors is None:
        click.echo(f"no {root / data.colors}: the classes get colours that differ well", err=True)
    return names, colors or spread_colors(len(names))


def _given_colors(data: "DataConfig", classes: int) -> list[tuple[int, int, int]] | None:
    from pspnet_fast.data.lists import read_colors
    from pspnet_fast.training.config import DataConfig

    path = Path(data.root) / data.colors
    missing = data.colors == DataConfig.colors and not path.exists()  # a file that was asked for must be there
    return None if missing else read_colors(path, classes)


def list_dataset(data: "DataConfig", list_file: str, classes: int, transform: Any, seed: int = 0) -> "ListDataset":
    from pspnet_fast.data.labels import LabelReader
    from pspnet_fast.data.list_dataset import ListDataset

    root = Path(data.root)
    labels = LabelReader(classes, data.labels, data.remap, _given_colors(data, classes))
    return ListDataset(root, root / list_file, labels, transform, seed)


def validation_set(data: "DataConfig", classes: int, mean: Sequence[float], std: Sequence[float]) -> "ListDataset":
    from pspnet_fast.data.transforms import EvalTransform

    return list_dataset(data, data.val_list, classes, EvalTransform(mean, std, data.val_crop))


def load_predictor(checkpoint: Path, device: str) -> "Predictor":
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.checkpoint import load_checkpoint
    from pspnet_fast.training.evaluation import choose_device

    return Predictor.from_checkpoint(load_checkpoint(checkpoint), choose_device(device))
