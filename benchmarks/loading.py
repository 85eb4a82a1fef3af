"""Images that one process loads for training in a second of processor time: whole images, or the crop alone.

    PYTHONPATH=tests python benchmarks/loading.py

Three kinds of files of smooth noise: 480x360 and 683x512 as JPEG, 2048x1024 as PNG. Processor time, so that a busy
machine changes it little; the three ways take turns, and each number is the median of the rounds.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import semseg_transforms
import torch
from torch import Tensor

from pspnet_fast.data.list_dataset import PairDataset
from pspnet_fast.data.transforms import TrainTransform, normalise
from pspnet_fast.training.loading import train_loader

CASES = [(360, 480, ".jpg", (240, 320)), (512, 683, ".jpg", (473, 473)), (1024, 2048, ".png", (713, 713))]
IMAGES, ROUNDS = 8, 7


class Whole(TrainTransform):
    """The same steps on the whole image, by OpenCV's functions; the crop is cut out last."""

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        image, label = semseg_transforms.augment(self, image.astype(np.float32), label, rng)
        return normalise(image, self.mean, self.std), Tensor(label.astype(np.int64))


def write_pairs(folder: Path, height: int, width: int, suffix: str) -> list[tuple[Path, Path]]:
    rng, pairs = np.random.default_rng(0), []
    for index in range(IMAGES):
        small = rng.integers(256, size=(height // 8, width // 8, 3)).astype(np.uint8)
        image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        label = cv2.resize(small[..., 0] % 19, (width, height), interpolation=cv2.INTER_NEAREST)
        paths = folder / f"{index}{suffix}", folder / f"{index}_label.png"
        for path, pixels in zip(paths, (image, label), strict=True):
            cv2.imwrite(str(path), pixels)
        pairs.append(paths)
    return pairs


def seconds(dataset: PairDataset, epoch: int) -> float:
    """Of the processor, for loading every image once in this process."""
    dataset.set_epoch(epoch)
    start = time.process_time()
    for _ in train_loader(dataset, 4, 0, 0, epoch):
        pass
    return time.process_time() - start


def main() -> None:
    cv2.setNumThreads(0)  # as in a loading process
    torch.set_num_threads(1)
    print(f"OpenCV {cv2.__version__}; images a second of processor time\n")
    print("| images | crop | whole images | crop first | crop first, decoded images cached |\n|---|---|---:|---:|---:|")
    for height, width, suffix, crop in CASES:
        with tempfile.TemporaryDirectory() as folder:
            pairs = write_pairs(Path(folder), height, width, suffix)
            ways = [
                PairDataset(pairs, "whole", 19, Whole(crop)),
                PairDataset(pairs, "first", 19, TrainTransform(crop)),
                PairDataset(pairs, "cached", 19, TrainTransform(crop), cache_bytes=5 * IMAGES * height * width),
            ]
            for dataset in ways:
                seconds(dataset, 0)
            times = [[seconds(dataset, epoch) for dataset in ways] for epoch in range(1, ROUNDS + 1)]
            speeds = (f"{IMAGES / median(column):.1f}" for column in zip(*times, strict=True))
            print(f"| {width}x{height} {suffix[1:].upper()} | {crop[1]}x{crop[0]} | {' | '.join(speeds)} |", flush=True)


if __name__ == "__main__":
    main()
