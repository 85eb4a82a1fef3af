"""Images and labels named by a list file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from pspnet_fast.data import DataError
from pspnet_fast.data.images import Image, read_image
from pspnet_fast.data.labels import Label, LabelReader
from pspnet_fast.data.lists import read_list

Transform = Callable[[Image, Label, np.random.Generator], tuple[Tensor, Tensor]]


class ListDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of (image float32 (3, H, W), label int64 (H, W)) named by a list file.

    An item depends on (seed, epoch, index) only, whatever the number of workers.

    Args:
        root: folder to which the names in the list are relative.
        list_file: lines ``IMAGE LABEL``.
        labels: reads a label file; a number of classes K stands for ``LabelReader(K)``.
        transform: maps (image, label, generator) to the two tensors.
        seed: of the transform's random choices.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_list`. Reading an item raises :class:`DataError` for a file that
        is no image, a label of another size than its image, or a label value that is neither a class nor ignored.
    """

    def __init__(
        self, root: Path, list_file: Path, labels: LabelReader | int, transform: Transform, seed: int = 0
    ) -> None:
        self.list_file = list_file
        self.pairs = read_list(root, list_file)
        self.labels = LabelReader(labels) if isinstance(labels, int) else labels
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the random choices; call it before an iterator over a DataLoader starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.read(index)
        return self.transform(image, label, np.random.default_rng((self.seed, self.epoch, index)))

    def read(self, index: int) -> tuple[Image, Label]:
        """Image and label of one pair, checked, before the transform.

        An image is turned as its EXIF orientation says, unless its label has the size of the image as stored.
        """
        image_path, label_path = self.pairs[index]
        image, label = read_image(image_path), self.labels(label_path)
        if image.shape[1::-1] == label.shape != image.shape[:2]:
            image = read_image(image_path, oriented=False)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{label_path}: label of {_size(label.shape)} for an image of {_size(image.shape)} ({image_path})"
            )
        return image, label


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]} pixels"
