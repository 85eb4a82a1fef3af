"""Scores of a data set under a protocol, in one process and in two, and in bounded memory."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_distributed import two_processes
from toy_backbone import ToyBackbone
from toy_data import NAMES, write_toy_data

from pspnet_fast.data.images import to_float
from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import EvalTransform, PixelTransform, normalise
from pspnet_fast.inference import memory
from pspnet_fast.inference.protocol import Protocol
from pspnet_fast.inference.sliding import Segmenter
from pspnet_fast.models import PSPNet
from pspnet_fast.training import evaluate
from pspnet_fast.training.boundary import boundary_counts
from pspnet_fast.training.calibration import calibration_counts
from pspnet_fast.training.distributed import World, join, leave
from pspnet_fast.training.loading import val_loader
from pspnet_fast.training.metrics import image_counts
from pspnet_fast.training.scoring import Scores, score_images

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
WINDOWS = Protocol.of("semseg", crop=(25, 33), scales=(0.75, 1.25))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images, of which the fourth and fifth have sizes of their own."""
    root = write_toy_data(tmp_path_factory.mktemp("scoring") / "data", val=7)
    for index, size in ((3, (31, 45)), (4, (62, 20))):
        for end, how in ((".png", cv2.INTER_LINEAR), ("_label.png", cv2.INTER_NEAREST)):
            path = str(root / f"val_{index}{end}")
            cv2.imwrite(path, cv2.resize(cv2.imread(path, cv2.IMREAD_UNCHANGED), size[::-1], interpolation=how))
    return root


def segmenter(protocol: Protocol) -> Segmenter:
    torch.manual_seed(0)
    model = PSPNet(len(NAMES), ToyBackbone(), bins=(1, 2)).double().eval()
    return Segmenter(model, len(NAMES), MEAN, STD, protocol)


def pairs(root: Path) -> ListDataset:
    return ListDataset(root, root / "val.txt", len(NAMES), PixelTransform())


def assert_equal(one: Scores, other: Scores) -> None:
    assert torch.equal(one.metrics.confusion, other.metrics.confusion)
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.boundary, other.boundary)
    torch.testing.assert_close(one.calibration, other.calibration, rtol=0, atol=1e-9)


def test_counts_are_those_of_single_predictions(root: Path) -> None:
    predict, dataset = segmenter(WINDOWS), pairs(root)
    seen: dict[int, np.ndarray] = {}
    scores = score_images(predict, dataset, boundary=True, calibration=True, batch_size=3,
                          predicted=lambda index, image, label: seen.update({index: label}))  # fmt: skip
    assert sorted(seen) == list(range(7))
    total = torch.zeros(3, 3, dtype=torch.int64)
    edges, curve = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 15, dtype=torch.float64)
    for index, found in seen.items():
        image, label = dataset.read(index)
        classes, confidence = predict([image], confidence=True)
        assert (classes[0].numpy() == found).all()
        confusion = torch.zeros(3, 3, dtype=torch.int64)
        for truth in range(3):
            for guess in range(3):
                confusion[truth, guess] = int(((label == truth) & (found == guess)).sum())
        assert torch.equal(scores.counts[index], image_counts(confusion))
        total += confusion
        edges += boundary_counts(label, found, 3)
        curve += calibration_counts(classes[0], confidence[0], torch.from_numpy(label))
    assert scores.metrics.absent == "zero"
    assert_equal(scores, Scores(type(scores.metrics)(total), scores.counts, edges, curve, 0.0, None))
    assert total.sum() > 7000
    assert scores.seconds > 0


def test_whole_images_are_scored_as_in_training(root: Path) -> None:
    predict = segmenter(Protocol())
    whole = ListDataset(root, root / "val.txt", len(NAMES), EvalTransform(MEAN, STD))
    expected = evaluate(predict.model, val_loader(whole, 1, 0), len(NAMES))
    assert torch.equal(score_images(predict, pairs(root), batch_size=2).metrics.confusion, expected.confusion)
    crop = (33, 41)
    centres = ListDataset(root, root / "val.txt", len(NAMES), EvalTransform(MEAN, STD, crop))
    expected = evaluate(predict.model, val_loader(centres, 1, 0), len(NAMES))
    same = ListDataset(root, root / "val.txt", len(NAMES), PixelTransform(MEAN, crop))
    assert torch.equal(score_images(predict, same).metrics.confusion, expected.confusion)


def share_of_the_scores(root: Path, out: Path) -> None:
    world = World.from_environment()
    join(world, torch.device("cpu"))
    own: list[int] = []
    scores = score_images(segmenter(WINDOWS), pairs(root), boundary=True, calibration=True, world=world,
                          predicted=lambda index, *_: own.append(index))  # fmt: skip
    torch.save((scores, own), out / f"{world.rank}.pt")
    leave()


def test_two_processes_count_as_one(root: Path, tmp_path: Path) -> None:
    assert two_processes(share_of_the_scores, root, tmp_path) == [0, 0]
    (first, even), (second, odd) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert (even, odd) == ([0, 2, 4, 6], [1, 3, 5])  # each once, the odd one out too
    alone = score_images(segmenter(WINDOWS), pairs(root), boundary=True, calibration=True)
    assert_equal(first, alone)
    assert_equal(second, alone)


@pytest.mark.parametrize(("text", "number"), [("4G", 4 * 10**9), ("1.5 gb", 15 * 10**8), ("500M", 5 * 10**8), ("7", 7)])
def test_bytes(text: str, number: int) -> None:
    assert memory.parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4GiB", "many"])
def test_bytes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size such as 4G or 500M"):
        memory.parse_bytes(text)


def test_the_batch_fits_the_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The less there is the fewer windows are predicted at a time; with too little nothing starts."""
    predict = segmenter(WINDOWS)
    cost = memory.Cost(forward=100 * 10**6, logits=10**5, pixels=25 * 33)
    monkeypatch.setattr(memory, "_resident", lambda: 10**9)
    least = memory.fit(predict, cost, 1, 40, 48, None).device_bytes - 7 * 115 * 10**6  # batches of 8 as ever
    for windows in (1, 3, 8, 20):
        plan = memory.fit(predict, cost, 1, 40, 48, 10**9 + least + (windows - 1) * 115 * 10**6 + 10**6)
        assert plan.segmenter.batch == min(windows, 8)
        assert abs(plan.device_bytes - least - (plan.segmenter.batch - 1) * 115 * 10**6) <= 1
    with pytest.raises(ValueError, match=r"48x40 pixels needs 1\d+.\d MB, of which 115.0 MB for one window, but may"):
        memory.fit(predict, cost, 1, 40, 48, 10**9 + least - 10**6)
    with pytest.raises(ValueError, match=r"for one whole image, but may have .* windows \(a crop\) take less"):
        memory.fit(segmenter(Protocol()), cost, 1, 4000, 4800, 10**9)


def test_wider_images_scales_and_mirror_images_are_estimated_higher() -> None:
    cost = memory.Cost(10**7, 10**6, 473 * 473)

    def estimate(protocol: Protocol, height: int = 3000, width: int = 3000) -> int:
        return memory.fit(segmenter(protocol), cost, 1, height, width, None).device_bytes

    semseg = estimate(Protocol.of("semseg"))
    assert estimate(Protocol.of("semseg"), width=6000) > 1.5 * semseg
    assert estimate(Protocol.of("semseg", scales=(1.0, 1.5))) > 1.3 * semseg
    assert estimate(Protocol.of("semseg"), height=30000) < 3 * semseg  # strips are as high as a window
    windows = {"crop": (473, 473)}
    assert estimate(Protocol.of("mmseg", **windows, flip=True)) > 1.1 * estimate(Protocol.of("mmseg", **windows))


def test_a_bound_is_kept_and_told(root: Path) -> None:
    plans: list[memory.Plan] = []
    bounded = score_images(segmenter(WINDOWS), pairs(root), budget=10**12, planned=plans.append)
    assert len(plans) == 3  # a plan for each size
    assert all(plan.segmenter.batch == 8 for plan in plans)
    assert torch.equal(bounded.counts, score_images(segmenter(WINDOWS), pairs(root)).counts)
    with pytest.raises(ValueError, match=r"but may have 1\.0 MB"):
        score_images(segmenter(WINDOWS), pairs(root), budget=10**6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_are_normalised_to_the_bit(dtype: type, channels_last: bool) -> None:
    rng = np.random.default_rng(0)
    most = {np.uint8: 256, np.uint16: 65536, np.float32: 256}[dtype]
    images = [(rng.random((37, 41, 3)) * most).astype(dtype) for _ in range(2)]
    images[1] = images[1][:, ::-1]  # a view, as flips make them
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    predict = replace(segmenter(Protocol()), mean=mean, std=std, channels_last=channels_last)
    found = predict._normalised(images)
    assert torch.equal(found, torch.stack([normalise(to_float(image), mean, std) for image in images]))
    assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


GREEDY = """
import torch
from pspnet_fast.inference import memory
from pspnet_fast.inference.protocol import Protocol
from pspnet_fast.inference.sliding import Segmenter

class Greedy(torch.nn.Module):
    align_corners = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input):
        if input.size(2) == 100:
            [torch.ones(1024) for _ in range(16 * 1024)]  # small ones, which come from the heap
        return {"out": input[:, :, ::8, ::8] * self.weight}

freed = [torch.ones(1024) for _ in range(32 * 1024)]
del freed
cost = memory.measure(Segmenter(Greedy(), 3, (0, 0, 0), (1, 1, 1), Protocol.of("mmseg", crop=(100, 100))), 300, 300)
print(cost.forward, cost.logits, cost.pixels)
"""


def test_what_the_model_takes_is_measured() -> None:
    """A module that fills 64 MB for each window is seen to, though the process had as much free before.

    In a process of its own: what other tests leave of its heap, in pages that are partly used, does not count.
    """
    told = subprocess.run([sys.executable, "-c", GREEDY], capture_output=True, text=True, check=True).stdout
    forward, logits, pixels = map(int, told.split())
    assert 60e6 < forward < 100e6
    assert (logits, pixels) == (3 * 13 * 13 * 4, 10**4)
