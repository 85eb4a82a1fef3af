"""Pairs of image and label as a data set."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from pspnet_fast.data import IGNORE_INDEX, DataError, UnreadableError
from pspnet_fast.data.cache import Cache
from pspnet_fast.data.conventions import ORIENTATIONS
from pspnet_fast.data.images import Image, decode_image, to_float
from pspnet_fast.data.labels import Label, LabelReader
from pspnet_fast.data.lists import read_list

UNREADABLE = ("error", "replace", "blank")
_BLANK = 64  # pixels a side of what stands for a pair of which nothing can be read
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
        unreadable: what becomes of a pair whose image or label is missing, damaged or no image: "error"; "replace", the
            next one that is readable stands for it, as training wants it; or "blank", a black image without a label,
            as validation wants it. Those passed over are named on stderr once, and counted.
        cache_bytes: of memory for decoded pairs, see :class:`Cache`.

    Raises:
        ValueError: an unknown orientation or ``unreadable``, or too little memory for the cache. Reading an item raises
        :class:`DataError` for a file that is no image, a label of another size than its image, or a label value that is
        neither a class nor ignored.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        source: str,
        labels: LabelReader | int,
        transform: Transform,
        seed: int = 0,
        orientation: str = "auto",
        unreadable: str = "error",
        cache_bytes: int = 0,
    ) -> None:
        if unreadable not in UNREADABLE:
            raise ValueError(f"unreadable must be one of {', '.join(map(repr, UNREADABLE))}, got {unreadable!r}")
        if orientation not in ORIENTATIONS:
            raise ValueError(f"orientation must be one of {', '.join(map(repr, ORIENTATIONS))}, got {orientation!r}")
        self.pairs, self.source = list(pairs), source
        self.unused: list[Path] = []  # labels beside those of the pairs
        self.labels = LabelReader(labels) if isinstance(labels, int) else labels
        self.transform = transform
        self.seed = seed
        self.orientation = orientation
        self.epoch = 0
        self.unreadable = unreadable
        self._cache = Cache(cache_bytes, len(self.pairs)) if cache_bytes else None
        # Written by the loading processes, read by the main one.
        self._skipped = torch.zeros(len(self.pairs), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the random choices; call it before an iterator over a DataLoader starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        image, label = self._item(index)
        return self.transform(image, label, np.random.default_rng((self.seed, self.epoch, index)))

    @property
    def skipped(self) -> list[tuple[Path, Path]]:
        """Pairs that could not be read and were passed over so far."""
        return [self.pairs[index] for index in self._skipped.nonzero().flatten().tolist()]

    def _item(self, index: int) -> tuple[Image, Label]:
        """The pair as decoded, or what stands for it."""
        for step in range(len(self)):
            at = (index + step) % len(self)
            if self._cache is not None and (kept := self._cache.get(at)):
                return kept
            try:
                pair = self._decode(at, self.labels)
            except UnreadableError as error:
                if self.unreadable == "error" or step == len(self) - 1:
                    raise
                self._pass_over(at, error)
                if self.unreadable == "blank":
                    return self._blank(at)
                continue
            if self._cache is not None:
                self._cache.put(at, *pair)
            return pair
        raise AssertionError("the last step returns or raises")

    def _pass_over(self, index: int, error: UnreadableError) -> None:
        if not self._skipped[index]:
            self._skipped[index] = True
            tqdm.write(f"Warning: passed over: {error}", sys.stderr)

    def _blank(self, index: int) -> tuple[Image, Label]:
        """A black image, of the size of the file that can be read, without a label."""
        image, label = self.pairs[index]
        size: tuple[int, ...] = (_BLANK, _BLANK)
        for read in (lambda: decode_image(image), lambda: self.labels(label)):
            try:
                size = read().shape[:2]
            except DataError:
                continue
        return np.zeros((*size, 3), np.uint8), np.full(size, IGNORE_INDEX, np.uint8)

    def read(self, index: int, read_label: Callable[[Path, bool], Label] | None = None) -> tuple[Image, Label]:
        """Image and label of one pair, checked, before the transform.

        Args:
            read_label: reads the label file, turned or as stored; by default ``self.labels``.
        """
        image, label = self._decode(index, read_label or self.labels)
        return to_float(image), label

    def _decode(self, index: int, read_label: Callable[[Path, bool], Label]) -> tuple[Image, Label]:
        image_path, label_path = self.pairs[index]
        oriented = self.orientation != "stored"
        image, label = decode_image(image_path, oriented), read_label(label_path, oriented)
        if self.orientation == "auto" and image.shape[1::-1] == label.shape != image.shape[:2]:
            image = decode_image(image_path, oriented=False)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{label_path}: label of {_size(label.shape)} for an image of {_size(image.shape)} "
                f"({image_path}{self._turn(image_path)})"
            )
        return image, label

    def _turn(self, path: Path) -> str:
        """What an EXIF orientation does to the size of an image, if it does."""
        stored, turned = (decode_image(path, oriented).shape for oriented in (False, True))
        if stored == turned:
            return ""
        return f": {_size(stored)} as stored, which its EXIF orientation turns; data.orientation={self.orientation}"


class ListDataset(PairDataset):
    """A :class:`PairDataset` named by a list file with lines ``IMAGE LABEL``, relative to ``root``.

    Args:
        failed: takes the errors of lines that name no pair, see :func:`read_list`.
        more: further arguments of :class:`PairDataset`.

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
        **more: Any,
    ) -> None:
        pairs = read_list(root, list_file, failed)
        super().__init__(pairs, str(list_file), labels, transform, seed, orientation, **more)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]} pixels"
