"""DataLoaders whose order and random numbers depend on a seed and the epoch only."""

import itertools
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, default_collate

from pspnet_fast.data import DataError

Item = tuple[Tensor, Tensor]


class _Rest(Sampler[list[int]]):
    """The batches of a sampler but the first ``done``."""

    def __init__(self, batches: BatchSampler, done: int) -> None:
        self._batches, self._done = batches, done

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self._batches), self._done, None)

    def __len__(self) -> int:
        return len(self._batches) - self._done


def train_loader(
    dataset: Dataset[Item],
    batch_size: int,
    workers: int,
    seed: int,
    epoch: int,
    pin_memory: bool = False,
    *,
    done: int = 0,
) -> DataLoader[Item]:
    """Loader of one epoch: shuffled by (seed, epoch), the incomplete last batch and the first ``done`` left out."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    order = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
    batches = _Rest(BatchSampler(order, batch_size, drop_last=True), done)
    return _loader(dataset, workers, generator, pin_memory, batch_sampler=batches)


def val_loader(dataset: Dataset[Item], batch_size: int, workers: int, pin_memory: bool = False) -> DataLoader[Item]:
    """Loader of every item once, in order."""
    return _loader(dataset, workers, torch.Generator(), pin_memory, batch_size=batch_size)


def _loader(
    dataset: Dataset[Item], workers: int, generator: torch.Generator, pin_memory: bool, **batches: Any
) -> DataLoader[Item]:
    # With a generator of its own a loader leaves the global one, which drives dropout, as it was.
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        generator=generator,
        pin_memory=pin_memory,
        **batches,
    )


def _collate(items: list[Item]) -> Item:
    sizes = sorted({tuple(label.shape) for _, label in items})
    if len(sizes) > 1:
        raise DataError(f"images of one batch differ in size (height, width): {sizes}; use a batch size of 1 or a crop")
    return default_collate(items)


def _start_worker(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # the workers already share the cores among themselves
    # Ctrl+C goes to the whole group; the main process ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
