"""Scores of a model on a data set under a test protocol: each image once, by one process or by several."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pspnet_fast import ops
from pspnet_fast.data.images import Image
from pspnet_fast.data.labels import Label
from pspnet_fast.data.list_dataset import PairDataset
from pspnet_fast.inference.memory import Cost, Plan, fit, measure, peak_memory
from pspnet_fast.inference.sliding import Segmenter
from pspnet_fast.training.boundary import boundary_counts
from pspnet_fast.training.calibration import BINS, calibration_counts
from pspnet_fast.training.distributed import World
from pspnet_fast.training.loading import start_worker
from pspnet_fast.training.metrics import Metrics, image_counts

Predicted = Callable[[int, Image, Label], None]
"""Takes the index of an image, the image (H, W, 3) and its predicted classes (H, W) uint8."""
_Pair = tuple[int, Tensor, Tensor]  # index, image (H, W, 3), label (H, W)


@dataclass(frozen=True)
class Scores:
    """What is counted on a data set, over all processes.

    Attributes:
        metrics: scores of all pixels.
        counts: (images, 3, K) int64, image by image, of :func:`pspnet_fast.training.metrics.image_counts`.
        boundary: (2, K) int64 of :func:`pspnet_fast.training.boundary.boundary_counts`, if asked for.
        calibration: (3, M) of :func:`pspnet_fast.training.calibration.calibration_counts`, if asked for.
        seconds: from the first image to the last.
        peak_memory: bytes, see :func:`pspnet_fast.inference.memory.peak_memory`; of this process.
    """

    metrics: Metrics
    counts: Tensor
    boundary: Tensor | None
    calibration: Tensor | None
    seconds: float
    peak_memory: int | None


def score_images(
    segmenter: Segmenter,
    dataset: PairDataset,
    *,
    batch_size: int = 1,
    workers: int = 0,
    budget: int | None = None,
    boundary: bool = False,
    calibration: bool = False,
    world: World | None = None,
    predicted: Predicted | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Scores:
    """Predict every image of ``dataset`` once and count.

    The counts of several processes are those of one, to the last; a convolution may round otherwise in batches of
    another size, so with ``batch_size`` above 1 a pixel whose two best classes are equal but for rounding may differ.

    Args:
        dataset: pairs of image and label as :class:`pspnet_fast.data.transforms.PixelTransform` gives them.
        batch_size: neighbours in the list of one size that are predicted together, at most.
        workers: loading processes; 0 loads in this one.
        budget: bytes that the process, or torch on a GPU, may take; see :func:`pspnet_fast.inference.memory.fit`.
        boundary, calibration: what to count as well.
        world: the processes, connected by :func:`pspnet_fast.training.distributed.join`; each takes its share.
        predicted: called with each prediction of this process.
        planned: called with the plan for images of each new size, before the first of them.

    Raises:
        ValueError: an image does not fit into the budget.
    """
    world = world or World()
    counting = _Counting(len(dataset), segmenter, boundary, calibration)
    plans = _Plans(segmenter, budget, planned)
    indices = range(world.rank, len(dataset), world.size)
    loader: Any = DataLoader(
        dataset,
        sampler=indices,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    pairs = ((index, *pair) for index, pair in zip(indices, loader, strict=True))
    start = time.perf_counter()
    bar = tqdm(total=len(indices), desc="evaluation", unit="img", disable=None if world.first else True)
    with bar:
        for group in _of_one_size(pairs, batch_size):
            images = [image.numpy() for _, image, _ in group]
            classes, confidence = plans.segmenter(images)(images, confidence=calibration)
            counting.add(group, classes, confidence)
            if predicted:
                for (index, *_), image, label in zip(group, images, classes.to("cpu", torch.uint8), strict=True):
                    predicted(index, image, label.numpy())
            bar.update(len(group))
    scores = counting.scores(world)
    return replace(scores, seconds=time.perf_counter() - start)


class _Plans:
    """The segmenter for images of each size, its batch chosen to fit the memory."""

    def __init__(self, segmenter: Segmenter, budget: int | None, planned: Callable[[Plan], None] | None) -> None:
        self._segmenter, self._budget, self._planned = segmenter, budget, planned
        self._cost: Cost | None = None
        self._plans: dict[tuple[int, ...], Segmenter] = {}

    def segmenter(self, images: list[Image]) -> Segmenter:
        if self._budget is None:
            return self._segmenter
        height, width = images[0].shape[:2]
        key = len(images), height, width
        if key not in self._plans:
            self._cost = self._cost or measure(self._segmenter, height, width)
            plan = fit(self._segmenter, self._cost, *key, self._budget)
            self._plans[key] = plan.segmenter
            if self._planned:
                self._planned(plan)
        return self._plans[key]


class _Counting:
    """Counts of one process, on the device."""

    def __init__(self, images: int, segmenter: Segmenter, boundary: bool, calibration: bool) -> None:
        self._device, self._absent = segmenter.device, segmenter.protocol.absent
        self._classes = classes = segmenter.classes
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self._device)
        self._counts = torch.zeros(images, 3, classes, dtype=torch.int64, device=self._device)
        self._boundary = torch.zeros(2, classes, dtype=torch.int64) if boundary else None
        self._calibration = torch.zeros(3, BINS, dtype=torch.float64, device=self._device) if calibration else None

    def add(self, group: list[_Pair], predictions: Tensor, confidence: Tensor | None) -> None:
        for place, (index, _, label) in enumerate(group):
            target = label.to(self._device, non_blocking=True)
            prediction = predictions[place].to(self._device)
            confusion = ops.confusion_matrix(prediction, target, self._classes)
            self._confusion += confusion
            self._counts[index] = image_counts(confusion)
            if self._boundary is not None:
                self._boundary += boundary_counts(label.numpy(), prediction.cpu().numpy(), self._classes)
            if self._calibration is not None:
                assert confidence is not None
                self._calibration += calibration_counts(prediction, confidence[place].to(self._device), target)

    def scores(self, world: World) -> Scores:
        """The sums over all processes, on the CPU."""
        parts = [
            None if part is None else world.sum(part.to(self._device)).cpu()
            for part in (self._confusion, self._counts, self._boundary, self._calibration)
        ]
        confusion, counts, boundary, calibration = parts
        assert confusion is not None
        assert counts is not None
        return Scores(Metrics(confusion, self._absent), counts, boundary, calibration, 0.0, peak_memory(self._device))


def _of_one_size(pairs: Iterable[_Pair], most: int) -> Iterator[list[_Pair]]:
    """Neighbours of one size and dtype, at most so many at a time."""
    group: list[_Pair] = []
    for pair in pairs:
        kind = pair[1].shape, pair[1].dtype
        if group and (len(group) == most or kind != (group[0][1].shape, group[0][1].dtype)):
            yield group
            group = []
        group.append(pair)
    if group:
        yield group
