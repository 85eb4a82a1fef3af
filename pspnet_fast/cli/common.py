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
    from pspnet_fast.data.list_dataset import read_colors, read_names

    root = Path(data.root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: no folder {root}; name it on the command line: data.root=FOLDER")
    names = read_names(root / data.names)
    return names, read_colors(root / data.colors, len(names))


def list_dataset(data: "DataConfig", list_file: str, classes: int, transform: Any, seed: int = 0) -> "ListDataset":
    from pspnet_fast.data.list_dataset import ListDataset

    root = Path(data.root)
    return ListDataset(root, root / list_file, classes, transform, seed)


def validation_set(data: "DataConfig", classes: int, mean: Sequence[float], std: Sequence[float]) -> "ListDataset":
    from pspnet_fast.data.transforms import EvalTransform

    return list_dataset(data, data.val_list, classes, EvalTransform(mean, std, data.val_crop))


def load_predictor(checkpoint: Path, device: str) -> "Predictor":
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.checkpoint import load_checkpoint
    from pspnet_fast.training.evaluation import choose_device

    return Predictor.from_checkpoint(load_checkpoint(checkpoint), choose_device(device))
