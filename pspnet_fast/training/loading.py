"""DataLoaders whose order and random numbers depend on a seed and the place in the training only."""

import functools
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from pspnet_fast.data import DataError

Item = tuple[Tensor, Tensor]
Place = tuple[int, int]  # epoch, index of the image


@functools.lru_cache(maxsize=1)
def _epoch_order(images: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    return torch.randperm(images, generator=generator).tolist()


def places_of(images: int, batch_size: int, seed: int, step: int) -> list[Place]:
    """The images, those of all processes, of the iteration that ``step`` others come before."""
    epoch, batch = divmod(step, images // batch_size)
    indices = _epoch_order(images, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    return [(epoch, index) for index in indices]


class _Places(Sampler[list[Place]]):
    """For each iteration of ``steps`` the share of one process in its batch, in ``parts`` lists."""

    def __init__(self, images: int, batch_size: int, seed: int, steps: range, share: Place, parts: int) -> None:
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._steps, self._share, self._parts = steps, share, parts

    def __iter__(self) -> Iterator[list[Place]]:
        rank, size = self._share
        for step in self._steps:
            mine = places_of(self._images, self._batch_size, self._seed, step)[rank::size]
            for part in range(self._parts):
                yield mine[part :: self._parts]

    def __len__(self) -> int:
        return len(self._steps) * self._parts


class _AtPlaces(Dataset[Item]):
    """The items of a data set by epoch and index."""

    def __init__(self, dataset: Dataset[Item]) -> None:
        self._dataset = dataset

    def __getitem__(self, place: Place) -> Item:
        epoch, index = place
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        return self._dataset[index]


def train_loader(
    dataset: Dataset[Item],
    batch_size: int,
    workers: int,
    seed: int,
    steps: range,
    pin_memory: bool = False,
    *,
    share: Place = (0, 1),
    parts: int = 1,
) -> DataLoader[Item]:
    """Loader of the iterations ``steps``, counted from 0 at the beginning of the training; epochs follow each other.

    An epoch is shuffled by (seed, epoch), its incomplete last batch left out. Before an item is read the data set's
    ``set_epoch(epoch)`` is called if it has one. Of each batch the loader gives the share of one process, ``share`` =
    (its number, their number), as ``parts`` batches one after the other.
    """
    images = len(dataset)  # type: ignore[arg-type]
    places = _Places(images, batch_size, seed, steps, share, parts)
    return _loader(_AtPlaces(dataset), workers, pin_memory, batch_sampler=places)


def val_loader(
    dataset: Dataset[Item], batch_size: int, workers: int, pin_memory: bool = False, *, share: Place = (0, 1)
) -> DataLoader[Item]:
    """Loader of every item once, in order; of several processes' share each item is in one."""
    indices: Sequence[int] = range(share[0], len(dataset), share[1])  # type: ignore[arg-type]
    return _loader(dataset, workers, pin_memory, sampler=indices, batch_size=batch_size)


def _loader(dataset: Dataset[Item], workers: int, pin_memory: bool, **batches: Any) -> DataLoader[Item]:
    # With a generator of its own a loader leaves the global one, which drives dropout, as it was.
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
        pin_memory=pin_memory,
        **batches,
    )


def _collate(items: list[Item]) -> Item:
    sizes = sorted({tuple(label.shape) for _, label in items})
    if len(sizes) > 1:
        raise DataError(f"images of one batch differ in size (height, width): {sizes}; use a batch size of 1 or a crop")
    return default_collate(items)


def start_worker(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # the workers already share the cores among themselves
    # Ctrl+C goes to the whole group; the main process ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
