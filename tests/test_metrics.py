"""Scores of confusion counts, boundaries and confidences."""

import math

import cv2
import numpy as np
import pytest
import torch

from pspnet_fast.training.boundary import boundary_counts, boundary_iou
from pspnet_fast.training.calibration import calibration_counts, calibration_record
from pspnet_fast.training.metrics import Metrics, bootstrap_interval, image_counts, image_ious


def test_scores() -> None:
    metrics = Metrics(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 8]]))
    assert metrics.iou.tolist() == pytest.approx([6 / 9, 3 / 6, 1])
    assert metrics.accuracy.tolist() == pytest.approx([6 / 8, 3 / 4, 1])
    assert metrics.miou == pytest.approx((6 / 9 + 3 / 6 + 1) / 3)
    assert metrics.macc == pytest.approx((6 / 8 + 3 / 4 + 1) / 3)
    assert metrics.allacc == pytest.approx(17 / 20)


def test_absent_class_is_skipped_and_predicted_class_counts_zero() -> None:
    # class 1 is nowhere; class 2 is predicted but never labelled
    metrics = Metrics(torch.tensor([[3, 0, 1], [0, 0, 0], [0, 0, 0]]))
    assert metrics.iou[0] == 0.75
    assert math.isnan(metrics.iou[1])
    assert metrics.iou[2] == 0
    assert metrics.miou == pytest.approx(0.375)
    assert metrics.macc == pytest.approx(0.75)


def test_counts_beyond_float32() -> None:
    many = 2**24 + 1
    assert Metrics(torch.tensor([[many, 0], [1, 0]])).iou[0].item() == many / (many + 1)


def test_record_has_none_for_what_is_not() -> None:
    nothing = Metrics(torch.zeros(2, 2, dtype=torch.int64)).record()
    assert nothing == {"miou": None, "macc": None, "allacc": None, "iou": [None, None]}
    record = Metrics(torch.tensor([[3, 1], [0, 0]])).record()
    assert record == {"miou": 0.375, "macc": 0.75, "allacc": 0.75, "iou": [0.75, 0.0]}


def test_dice_and_frequency_weighted_iou() -> None:
    metrics = Metrics(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert metrics.dice.tolist()[:2] == pytest.approx([12 / 15, 6 / 9])
    assert math.isnan(metrics.dice[2])
    assert metrics.mdice == pytest.approx((12 / 15 + 6 / 9) / 2)
    assert metrics.fwiou == pytest.approx(8 / 12 * 6 / 9 + 4 / 12 * 3 / 6)


def test_rules_for_absent_classes() -> None:
    """On a toy of three classes, one of them absent, the four implementations differ as they are known to."""
    confusion = torch.tensor([[5, 1, 0], [2, 4, 0], [0, 0, 0]])
    ious = [5 / 8, 4 / 7]
    expected = {"skip": sum(ious) / 2, "zero": sum(ious) / 3, "one": (sum(ious) + 1) / 3}
    for rule, mean in expected.items():
        assert Metrics(confusion, rule).miou == pytest.approx(mean)
        assert Metrics(confusion, rule).allacc == pytest.approx(9 / 12)
    assert math.isnan(Metrics(confusion, "nan").miou)
    assert Metrics(confusion[:2, :2], "nan").miou == pytest.approx(sum(ious) / 2)
    assert math.isnan(Metrics(torch.zeros(2, 2, dtype=torch.int64), "zero").miou)  # no score is not a score of 0
    with pytest.raises(ValueError, match="absent must be 'skip', 'zero', 'one' or 'nan', got 'drop'"):
        Metrics(confusion, "drop")


def test_scores_of_single_images() -> None:
    confusions = [torch.tensor([[3, 1], [0, 0]]), torch.tensor([[4, 0], [0, 0]]), torch.zeros(2, 2, dtype=torch.int64)]
    counts = torch.stack([image_counts(confusion) for confusion in confusions])
    assert counts[0].tolist() == [[3, 0], [4, 0], [3, 1]]
    scores = image_ious(counts).tolist()
    assert scores[:2] == pytest.approx([0.375, 1.0])  # the second image has no trace of class 1
    assert math.isnan(scores[2])


@pytest.mark.parametrize("rule", ["skip", "zero"])
def test_bootstrap_interval(rule: str) -> None:
    """Drawn one image after the other, the same numbers of the generator give the same interval."""
    torch.manual_seed(0)
    confusions = torch.randint(0, 50, (12, 3, 3)) * torch.tensor([1, 1, 0])[:, None] * torch.tensor([1, 1, 0])
    confusions[4, 2, 2] = 30  # one image alone has class 2
    counts = torch.stack([image_counts(confusion) for confusion in confusions])
    low, high = bootstrap_interval(counts, rule, samples=50, level=0.8, seed=3)
    drawn = np.random.default_rng(3).multinomial(12, [1 / 12] * 12, size=50)
    scores = [Metrics(sum(n * c for n, c in zip(row.tolist(), confusions, strict=True)), rule).miou for row in drawn]
    assert (low, high) == pytest.approx(tuple(np.quantile(scores, [0.1, 0.9])))
    assert low < high
    assert all(map(math.isnan, bootstrap_interval(counts[:0])))


def boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """As the authors define it: the mask without what is left of it after so many erosions; the border is outside."""
    padded = np.pad(mask, 1).astype(np.uint8)
    for _ in range(distance):
        padded = cv2.erode(padded, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & ~padded[1:-1, 1:-1].astype(bool)


@pytest.mark.parametrize("size", [(60, 83), (9, 11), (1, 4), (200, 190)])
def test_boundary_iou(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    label, prediction = (cv2.resize(rng.integers(5, size=(6, 7), dtype=np.uint8), size[::-1],
                                    interpolation=cv2.INTER_NEAREST) for _ in range(2))  # fmt: skip
    label[size[0] // 3 : size[0] // 2, : size[1] // 2] = 255
    counts = boundary_counts(label, prediction, 6)
    distance = max(round(0.02 * math.hypot(*size)), 1)
    counted = label != 255
    for index in range(6):
        truth = boundary((label == index) & counted, distance)
        found = boundary((prediction == index) & counted, distance)
        assert counts[:, index].tolist() == [(truth & found).sum(), (truth | found).sum()]
    ratio, nothing = boundary_iou(torch.tensor([[1, 0], [4, 0]])).tolist()
    assert ratio == 0.25
    assert math.isnan(nothing)


def test_calibration() -> None:
    torch.manual_seed(0)
    classes, labels = torch.randint(0, 3, (2, 40, 50)), torch.randint(0, 3, (2, 40, 50))
    labels[0, :5] = 255
    confidence = torch.rand(2, 40, 50, dtype=torch.float64)
    confidence[1, 0, :3] = torch.tensor([0.0, 1.0, 0.6], dtype=torch.float64)  # ends, and an edge: 9 / 15
    record = calibration_record(calibration_counts(classes, confidence, labels))
    counted = (labels != 255).flatten()
    sure, right = confidence.flatten()[counted].double(), (classes == labels).flatten()[counted]
    error = 0.0
    for index in range(15):
        low, high = index / 15, (index + 1) / 15
        inside = (sure > low) & (sure <= high) | ((sure == 0) if index == 0 else False)
        assert record["count"][index] == inside.sum()
        assert record["confidence"][index] == pytest.approx(sure[inside].mean().item())
        assert record["accuracy"][index] == pytest.approx(right[inside].double().mean().item())
        error += abs(sure[inside].sum().item() - right[inside].sum().item()) / len(sure)
    assert record["ece"] == pytest.approx(error)
    assert sum(record["count"]) == 3750
    assert record["edges"] == pytest.approx([index / 15 for index in range(16)])
    nothing = calibration_record(calibration_counts(classes, confidence, torch.full_like(labels, 255)))
    assert (nothing["ece"], nothing["accuracy"][0]) == (None, None)
