"""Scores of confusion counts."""

import math

import pytest
import torch

from pspnet_fast.training.metrics import Metrics


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
