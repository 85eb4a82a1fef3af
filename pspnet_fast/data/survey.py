"""All files of a data set, read once: what each holds, what is wrong with it, and what follows for training."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pspnet_fast.data import IGNORE_INDEX, DataError
from pspnet_fast.data.labels import Label
from pspnet_fast.data.list_dataset import PairDataset

LARGEST_CROP = 713  # semseg's, of Cityscapes
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class FileReport:
    """What one pair holds.

    Attributes:
        image, label: its files.
        size: height and width; None where a file cannot be read or the two differ.
        pixels: of each class, and last of what is ignored.
        unknown: pixels of each value or colour of the label that is no class.
        error: why it cannot be used, apart from unknown values; None if it can.
    """

    image: Path
    label: Path
    size: tuple[int, int] | None
    pixels: Counts
    unknown: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None


def survey(dataset: PairDataset, classes: int, workers: int = 1) -> Iterator[FileReport]:
    """Read every pair, in order, in so many threads; what cannot be read is reported, not raised."""
    pool = ThreadPoolExecutor(max(workers, 1))
    try:
        yield from pool.map(lambda index: _look(dataset, index, classes), range(len(dataset)))
    finally:
        pool.shutdown(cancel_futures=True)


def _look(dataset: PairDataset, index: int, classes: int) -> FileReport:
    unknown: dict[str, int] = {}

    def read_label(path: Path, oriented: bool) -> Label:
        label, found = dataset.labels.inspect(path, oriented)
        unknown.update(found)
        return label

    image_path, label_path = dataset.pairs[index]
    try:
        _, label = dataset.read(index, read_label)
    except DataError as error:
        nothing = np.zeros(classes + 1, np.int64)
        return FileReport(image_path, label_path, None, nothing, unknown, str(error))
    counts = np.bincount(label.ravel(), minlength=IGNORE_INDEX + 1)
    counts[IGNORE_INDEX] -= sum(unknown.values())  # which read as ignored
    pixels = np.append(counts[:classes], counts[IGNORE_INDEX])
    return FileReport(image_path, label_path, (label.shape[0], label.shape[1]), pixels, unknown)


def _trouble(file: FileReport) -> str:
    """What is wrong with a pair; empty if nothing is."""
    unknown = ", ".join(f"{value} ({count} pixels)" for value, count in file.unknown.items())
    return "; ".join(filter(None, [file.error, unknown and f"{file.label}: no class: {unknown}"]))


@dataclass
class Summary:
    """What the files of one list or split hold together.

    Attributes:
        files: reports of all pairs.
        alone: errors of files that have no counterpart.
    """

    files: list[FileReport]
    alone: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """Everything that training would stop at, a line each."""
        return [*self.alone, *(text for file in self.files if (text := _trouble(file)))]

    @property
    def pixels(self) -> Counts:
        """Of each class, and last of what is ignored."""
        return np.sum([file.pixels for file in self.files], axis=0, dtype=np.int64)

    @property
    def images_with(self) -> Counts:
        """Images that have a pixel of the class."""
        return np.sum([file.pixels[:-1] > 0 for file in self.files], axis=0, dtype=np.int64)

    @property
    def unknown(self) -> Counter[str]:
        """Pixels of each value or colour that is no class."""
        total: Counter[str] = Counter()
        for file in self.files:
            total.update(file.unknown)
        return total

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """Images of each (height, width)."""
        return Counter(file.size for file in self.files if file.size)


def class_weights(files: Sequence[FileReport]) -> list[float]:
    """Weights by median frequency balancing, for ``train.class_weights``.

    The frequency of a class is the share of its pixels among the labelled pixels of the images that have it; its
    weight is the median of all frequencies over its own (Eigen and Fergus, Predicting depth, surface normals and
    semantic labels with a common multi-scale convolutional architecture, ICCV 2015). A class without a pixel gets 1.
    """
    pixels = np.array([file.pixels[:-1] for file in files], np.float64)
    labelled = (pixels > 0) * pixels.sum(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        frequency = pixels.sum(0) / labelled.sum(0)
    known = ~np.isnan(frequency)
    weights = np.ones(len(frequency))
    if known.any():
        weights[known] = np.median(frequency[known]) / frequency[known]
    return [float(weight) for weight in weights]


def suggested_crop(sizes: Counter[tuple[int, int]]) -> list[int] | None:
    """Height and width of a training crop: the largest 8k + 1 in the median height and width, LARGEST_CROP at most.

    With align_corners an image of 8k + 1 pixels has its corners on those of the logits at output stride 8.
    """
    if not sizes:
        return None
    median = np.median(np.array(list(sizes.elements())), axis=0)
    return [max(8 * int((min(extent, LARGEST_CROP) - 1) // 8) + 1, 9) for extent in median]


def to_csv(summaries: Mapping[str, Summary], names: Sequence[str]) -> str:
    """A line a file: part, files, size, pixels by class, ignored, unknown values, error."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["part", "image", "label", "height", "width", *names, "ignored", "unknown", "error"])
    for part, summary in summaries.items():
        nothing = [""] * (len(names) + 6)
        rows.writerows([part, *nothing, error] for error in summary.alone)
        for file in summary.files:
            unknown = "; ".join(f"{value}: {count}" for value, count in file.unknown.items())
            size: Sequence[Any] = file.size or ("", "")
            rows.writerow([part, file.image, file.label, *size, *file.pixels.tolist(), unknown, file.error or ""])
    return text.getvalue()
