"""What of a data set can be seen to be wrong before training starts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pspnet_fast.data import IGNORE_INDEX, DataError
from pspnet_fast.data.conventions import CLASSES
from pspnet_fast.data.list_dataset import ListDataset

SAMPLE = 8  # labels of each list, evenly spread


def check_lists(train_set: ListDataset, val_set: ListDataset) -> list[str]:
    """Read some pairs of both lists; return warnings, a sentence each.

    Raises:
        DataError: a pair cannot be used, or the labels are masks of 0 and 255, of which 255 would be ignored.
    """
    warnings, found = [], set()
    for dataset in (train_set, val_set):
        indices = _sample(dataset)
        values = {int(value) for index in indices for value in np.unique(dataset.read(index)[1])}
        if values == {IGNORE_INDEX}:
            warnings.append(f"{dataset.list_file}: every pixel of the {len(indices)} labels looked at is ignored")
        repeated = len(dataset) - len({image for image, _ in dataset.pairs})
        if repeated:
            warnings.append(f"{dataset.list_file}: {repeated} of {len(dataset)} lines name an image of a line before")
        found |= values
    if common := {image for image, _ in train_set.pairs} & {image for image, _ in val_set.pairs}:
        warnings.append(
            f"{len(common)} images stand in {train_set.list_file} and in {val_set.list_file}: scores will be too good"
        )
    labels = train_set.labels
    warnings += _by_color_other_classes(train_set)
    if labels.is_identity and labels.classes > 1 and found == {0, IGNORE_INDEX}:
        raise DataError(
            f"{train_set.list_file}: the labels looked at hold the values 0 and 255 only, and 255 is ignored; "
            '"data.remap={0: 0, 255: 1}" makes it class 1, "data.remap={0: 0, 1: 1, 255: 255}" says that it is none'
        )
    if labels.is_identity and labels.classes == CLASSES["ade20k"] and IGNORE_INDEX not in found:
        warnings.append(
            "150 classes and labels without 255: if they are ADE20K's files, which count from 1, "
            "use data.labels=ade20k; else every class is taken for the one after it"
        )
    return warnings


def _by_color_other_classes(dataset: ListDataset) -> list[str]:
    """A warning where palettes paint the indices in the colours of other classes."""
    if not dataset.labels.is_identity or dataset.labels.colors is None:
        return []
    by_color = replace(dataset.labels, convention="color")
    for path in (dataset.pairs[index][1] for index in _sample(dataset)):
        try:
            painted = by_color(path)
        except DataError:  # other colours than those of the classes say nothing
            continue
        if painted.min() < painted.max() and (painted != dataset.labels(path)).any():
            return [
                f"{path}: its palette has the colours of the classes, but at other indices; the indices are taken, "
                "data.labels=color takes the colours"
            ]
    return []


def _sample(dataset: ListDataset) -> list[int]:
    return np.unique(np.linspace(0, len(dataset) - 1, SAMPLE).round().astype(int)).tolist()


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """A warning for each of data.mean and data.std that is given in 0..255."""
    large_mean = max(mean) > 1
    large_std = max(std) > 1 or (large_mean and min(std) == 1)
    return [
        f"data.{key}={_plain(values)} looks like values for 0..255; images are in 0..1 here: "
        f"data.{key}={_plain([value / 255 for value in values])}"
        for key, values, large in (("mean", mean, large_mean), ("std", std, large_std))
        if large
    ]


def _plain(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.6g}" for value in values) + "]"
