"""What of a data set can be seen to be wrong before training starts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pspnet_fast.data import IGNORE_INDEX, DataError, UnreadableError
from pspnet_fast.data.conventions import CLASSES
from pspnet_fast.data.images import unused_bits
from pspnet_fast.data.list_dataset import PairDataset

SAMPLE = 8  # pairs of each list, evenly spread
SCAN = 500  # labels of each list in which classes are looked for


def check_lists(*datasets: PairDataset) -> list[str]:
    """Read some pairs of each list, training before validation; return warnings, a sentence each.

    Raises:
        DataError: a pair cannot be used, or the labels are masks of 0 and 255, of which 255 would be ignored.
    """
    warnings, found = [], set()
    for dataset in datasets:
        values, odd = set(), []
        for index in (indices := _spread(dataset, SAMPLE)):
            try:
                image, label = dataset.read(index)
            except UnreadableError:
                if dataset.unreadable == "error":
                    raise
                continue
            values |= set(np.unique(label).tolist())
            if text := unused_bits(image):
                odd.append(f"{dataset.pairs[index][0]}: {text}")
        if values == {IGNORE_INDEX}:
            warnings.append(f"{dataset.source}: every pixel of the {len(indices)} labels looked at is ignored")
        warnings += [text + f" (as {len(odd)} of {len(indices)} images looked at)" for text in odd[:1]]
        repeated = len(dataset) - len({image for image, _ in dataset.pairs})
        if repeated:
            warnings.append(f"{dataset.source}: {repeated} of {len(dataset)} lines name an image of a line before")
        found |= values
    first, last = datasets[0], datasets[-1]
    if first is not last and (common := {image for image, _ in first.pairs} & {image for image, _ in last.pairs}):
        warnings.append(f"{len(common)} images stand in {first.source} and in {last.source}: scores will be too good")
    labels = first.labels
    warnings += _by_color_other_classes(first)
    if labels.is_identity and labels.classes > 1 and found == {0, IGNORE_INDEX}:
        raise DataError(
            f"{first.source}: the labels looked at hold the values 0 and 255 only, and 255 is ignored; "
            '"data.remap={0: 0, 255: 1}" makes it class 1, "data.remap={0: 0, 1: 1, 255: 255}" says that it is none'
        )
    if labels.is_identity and labels.classes == CLASSES["ade20k"] and IGNORE_INDEX not in found:
        warnings.append(
            "150 classes and labels without 255: if they are ADE20K's files, which count from 1, "
            "use data.labels=ade20k; else every class is taken for the one after it"
        )
    return warnings


def check_classes(dataset: PairDataset, names: Sequence[str]) -> list[str]:
    """Look for every class in the labels, in SCAN of them at most; return a warning if one has no pixel.

    Raises:
        DataError: a label cannot be used.
    """
    counts = np.zeros(IGNORE_INDEX + 1, np.int64)
    indices = _spread(dataset, SCAN)
    for index in tqdm(indices, desc=f"classes of {Path(dataset.source).name}", unit="label", leave=False, disable=None):
        try:
            counts += np.bincount(dataset.labels(dataset.pairs[index][1]).ravel(), minlength=len(counts))
        except UnreadableError:
            if dataset.unreadable == "error":
                raise
        if counts[: len(names)].all():
            return []
    if not counts[: len(names)].any():  # that all is ignored is said already
        return []
    where = "its labels" if len(indices) == len(dataset) else f"{len(indices)} of its {len(dataset)} labels"
    text = f"{dataset.source}: {unlabelled(counts, names)} in {where}"
    missing = [index for index in range(len(names)) if not counts[index]]
    if dataset.labels.is_identity and len(missing) == 1 and counts[IGNORE_INDEX]:
        others = [f"{index}: {index}" for index in range(len(names)) if counts[index]]
        others = others if len(others) <= 3 else [*others[:2], "..."]
        text += (
            f"; 255 is ignored, as {counts[IGNORE_INDEX] / counts.sum():.1%} of the pixels are: if it stands for that "
            f'class, "data.remap={{{", ".join(others)}, 255: {missing[0]}}}"'
        )
    return [text]


def unlabelled(counts: Sequence[int] | NDArray[np.int64], names: Sequence[str]) -> str:
    """``no pixel is class 1 (vessel)``, of the pixels that each class has; empty where all have some."""
    missing = [f"{index} ({name})" for index, name in enumerate(names) if not counts[index]]
    if not missing:
        return ""
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return f"no pixel is of class{'es' if len(missing) > 1 else ''} {', '.join(missing[:5])}{more}"


def _by_color_other_classes(dataset: PairDataset) -> list[str]:
    """A warning where palettes paint the indices in the colours of other classes."""
    if not dataset.labels.is_identity or dataset.labels.colors is None:
        return []
    by_color = replace(dataset.labels, convention="color")
    for path in (dataset.pairs[index][1] for index in _spread(dataset, SAMPLE)):
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


def _spread(dataset: PairDataset, count: int) -> list[int]:
    """Indices of so many pairs, the first, the last and evenly between them; of all where there are fewer."""
    return np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist()


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
