"""DataLoaders whose order and random numbers depend on a seed and the epoch only."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pspnet_fast.data import DataError

Item = tuple[Tensor, Tensor]


def train_loader(
    dataset: Dataset[Item], batch_size: int, workers: int, seed: int, epoch: int, pin_memory: bool = False
) -> DataLoader[Item]:
    """Loader of one epoch: shuffled by (seed, epoch), the incomplete last batch dropped."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    return _loader(dataset, batch_size, workers, generator, pin_memory, shuffle=True, drop_last=True)


def val_loader(dataset: Dataset[Item], batch_size: int, workers: int, pin_memory: bool = False) -> DataLoader[Item]:
    """Loader of every item once, in order."""
    return _loader(dataset, batch_size, workers, torch.Generator(), pin_memory)


def _loader(
    dataset: Dataset[Item], batch_size: int, workers: int, generator: torch.Generator, pin_memory: bool, **options: Any
) -> DataLoader[Item]:
    # With a generator of its own a loader leaves the global one, which drives dropout, as it was.
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        generator=generator,
        pin_memory=pin_memory,
        **options,
    )


def _collate(items: list[Item]) -> Item:
    sizes = sorted({tuple(label.shape) for _, label in items})
    if len(sizes) > 1:
        raise DataError(f"images of one batch differ in size (height, width): {sizes}; use a batch size of 1 or a crop")
    return default_collate(items)


def _start_worker(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # the workers already share the cores among themselves
