"""Pairs of image and label as a data set."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from pspnet_fast.data import DataError
from pspnet_fast.data.conventions import ORIENTATIONS
from pspnet_fast.data.images import Image, read_image
from pspnet_fast.data.labels import Label, LabelReader
from pspnet_fast.data.lists import read_list

Transform = Callable[[Image, Label, np.random.Generator], tuple[Tensor, Tensor]]


class PairDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of (image float32 (3, H, W), label int64 (H, W)), read from files.

    An item depends on (seed, epoch, index) only, whatever the number of workers.

    Args:
        pairs: paths of image and label.
        source: where the pairs are named, for messages.
        labels: reads a label file; a number of classes K stands for ``LabelReader(K)``.
        transform: maps (image, label, generator) to the two tensors.
        seed: of the transform's random choices.
        orientation: of photographs with an EXIF orientation: "turned" as viewers show them, as labels drawn on what is
            seen want it, "stored" as labels drawn on the file's pixels want it, or "auto": turned, unless the size of
            the label is that of the stored pixels alone. After a turn by 180 degrees, a reflection, or of a square no
            size can tell.

    Raises:
        ValueError: an unknown orientation. Reading an item raises :class:`DataError` for a file that is no image, a
        label of another size than its image, or a label value that is neither a class nor ignored.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        source: str,
        labels: LabelReader | int,
        transform: Transform,
        seed: int = 0,
        orientation: str = "auto",
    ) -> None:
        if orientation not in ORIENTATIONS:
            raise ValueError(f"orientation must be one of {', '.join(map(repr, ORIENTATIONS))}, got {orientation!r}")
        self.pairs, self.source = list(pairs), source
        self.unused: list[Path] = []  # labels beside those of the pairs
        self.labels = LabelReader(labels) if isinstance(labels, int) else labels
        self.transform = transform
        self.seed = seed
        self.orientation = orientation
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the random choices; call it before an iterator over a DataLoader starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.read(index)
        return self.transform(image, label, np.random.default_rng((self.seed, self.epoch, index)))

    def read(self, index: int, read_label: Callable[[Path, bool], Label] | None = None) -> tuple[Image, Label]:
        """Image and label of one pair, checked, before the transform.

        Args:
            read_label: reads the label file, turned or as stored; by default ``self.labels``.
        """
        image_path, label_path = self.pairs[index]
        oriented = self.orientation != "stored"
        image, label = read_image(image_path, oriented), (read_label or self.labels)(label_path, oriented)
        if self.orientation == "auto" and image.shape[1::-1] == label.shape != image.shape[:2]:
            image = read_image(image_path, oriented=False)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{label_path}: label of {_size(label.shape)} for an image of {_size(image.shape)} "
                f"({image_path}{self._turn(image_path)})"
            )
        return image, label

    def _turn(self, path: Path) -> str:
        """What an EXIF orientation does to the size of an image, if it does."""
        stored, turned = (read_image(path, oriented).shape for oriented in (False, True))
        if stored == turned:
            return ""
        return f": {_size(stored)} as stored, which its EXIF orientation turns; data.orientation={self.orientation}"


class ListDataset(PairDataset):
    """A :class:`PairDataset` named by a list file with lines ``IMAGE LABEL``, relative to ``root``.

    Args:
        failed: takes the errors of lines that name no pair, see :func:`read_list`.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_list` and :class:`PairDataset`.
    """

    def __init__(
        self,
        root: Path,
        list_file: Path,
        labels: LabelReader | int,
        transform: Transform,
        seed: int = 0,
        orientation: str = "auto",
        failed: list[Exception] | None = None,
    ) -> None:
        super().__init__(read_list(root, list_file, failed), str(list_file), labels, transform, seed, orientation)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]} pixels"
