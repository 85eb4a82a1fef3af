"""Decoded images and labels in memory that all loading processes share."""

import math
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pspnet_fast.data.images import Image
from pspnet_fast.data.labels import Label

_SHARED = Path("/dev/shm")  # where Linux keeps the memory that processes share
_ALIGNMENT = 16
_OFFSET, _HEIGHT, _WIDTH, _ITEM_SIZE = range(4)


class Cache:
    """Pairs by index, kept as they were decoded, in ``size`` bytes at most; what comes later is not kept.

    A pair of H x W pixels takes 4 H W bytes (7 H W where the image has 16 bits). All memory is reserved at once, so
    that a machine without it says so at the start. The processes of a DataLoader, those of later epochs too, share it.

    Args:
        size: bytes in all.
        pairs: number of pairs that there are.

    Raises:
        ValueError: this machine has not so much memory that processes can share.
    """

    def __init__(self, size: int, pairs: int) -> None:
        free = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else math.inf
        if size > free:
            raise ValueError(
                f"data.cache_gb asks for {size / 1e9:.3g} GB of shared memory, {_SHARED} has {free / 1e9:.3g} GB free"
            )
        self._bytes = torch.empty(size, dtype=torch.uint8).share_memory_()
        self._used = torch.zeros((), dtype=torch.int64).share_memory_()
        self._places = torch.zeros(pairs, 4, dtype=torch.int64).share_memory_()
        self._lock = torch.multiprocessing.get_context().Lock()

    def __len__(self) -> int:
        """Pairs that are kept."""
        return int((self._places[:, _ITEM_SIZE] > 0).sum())

    def get(self, index: int) -> tuple[Image, Label] | None:
        """The pair, not to be written to; None if it is not kept."""
        with self._lock:
            offset, height, width, item_size = self._places[index].tolist()
        if not item_size:
            return None
        pixels = height * width
        image = self._view(offset, 3 * pixels * item_size).view(np.uint16 if item_size == 2 else np.uint8)
        label = self._view(offset + 3 * pixels * item_size, pixels)
        return image.reshape(height, width, 3), label.reshape(height, width)

    def put(self, index: int, image: Image, label: Label) -> None:
        """Keep the pair if there is room: image uint8 or uint16 (H, W, 3), label uint8 (H, W)."""
        needed = image.nbytes + label.nbytes
        with self._lock:
            offset = -(-int(self._used) // _ALIGNMENT) * _ALIGNMENT
            if self._places[index, _ITEM_SIZE] or offset + needed > len(self._bytes):
                return
            target = self._bytes.numpy()[offset : offset + needed]
            target[: image.nbytes] = np.ascontiguousarray(image).reshape(-1).view(np.uint8)
            target[image.nbytes :] = label.reshape(-1)
            self._places[index] = torch.tensor([offset, *label.shape, image.itemsize])
            self._used.fill_(offset + needed)

    def _view(self, offset: int, length: int) -> NDArray[np.uint8]:
        view = self._bytes.numpy()[offset : offset + length]
        view.flags.writeable = False
        return view
