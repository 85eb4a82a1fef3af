"""Confusion counts and scores against loops over pixels."""

import math

import pytest
import torch

from pspnet_fast.training.metrics import Metrics, confusion_matrix


def test_counts_every_labelled_pixel_once() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (2, 5, 7), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    prediction = torch.randint(0, 4, (2, 5, 7), generator=generator)
    expected = [[0] * 4 for _ in range(4)]
    for truth, guess in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if truth != 255:
            expected[truth][guess] += 1
    counts = confusion_matrix(prediction, label, 4)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected


def test_small_label_types_do_not_overflow() -> None:
    label = torch.full((2, 2), 140, dtype=torch.uint8)
    assert confusion_matrix(torch.full((2, 2), 149), label, 150)[140, 149] == 4


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
