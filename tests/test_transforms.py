"""Transforms against their definition in semseg, on arrays small enough to check by eye."""

import numpy as np
import pytest
import semseg_transforms
import torch

from pspnet_fast.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Choices,
    EvalTransform,
    TrainTransform,
    normalise,
    pad_to,
)
from pspnet_fast.data.windows import Window, scaled_size

LEVELS = 0.1  # of 255
BORDER = (10.0, 20.0, 30.0)


def pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    label = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    return np.stack([label] * 3, -1).astype(np.float32), label


def results(transform, count: int = 40) -> list:
    return [transform(np.random.default_rng(seed)) for seed in range(count)]


def test_normalise() -> None:
    image = np.float32([[[255, 0, 51]]])
    expected = [(1 - 0.5) / 0.25, (0 - 0.4) / 0.2, (0.2 - 0.2) / 0.1]
    torch.testing.assert_close(
        normalise(image, (0.5, 0.4, 0.2), (0.25, 0.2, 0.1)), torch.tensor(expected).view(3, 1, 1), atol=1e-6, rtol=0
    )


def test_padding_is_centred_with_the_odd_pixel_after() -> None:
    image, label = pad_to(*pair(2, 3), (5, 4), BORDER)
    assert label.tolist() == [[255] * 4, [0, 1, 2, 255], [3, 4, 5, 255], [255] * 4, [255] * 4]
    assert image[0, 0].tolist() == list(BORDER)
    assert image[2, 1].tolist() == [4, 4, 4]


def test_padding_leaves_large_images_alone() -> None:
    image, label = pair(5, 6)
    assert pad_to(image, label, (5, 4), BORDER)[1] is label


def photograph(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth colours with noise, and a label of blocks."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:height, :width]
    image = np.stack(
        [np.broadcast_to(127 + 100 * np.sin(y / 9 + c) * np.cos(x / 7 - c), (height, width)) for c in range(3)], -1
    )
    label = ((y // 8 + x // 8) % 5).astype(np.uint8)
    return np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8), label


CASES = [
    (90, 130, (41, 33)),
    (40, 170, (57, 57)),
    (20, 30, (64, 64)),
    (64, 64, (64, 64)),
    (5, 3, (8, 8)),
    (1, 40, (9, 9)),
]


@pytest.mark.parametrize(("height", "width", "crop"), CASES)
def test_a_crop_has_the_pixels_of_the_whole(height: int, width: int, crop: tuple[int, int]) -> None:
    image, label = photograph(height, width)
    transform = TrainTransform(crop, mean=(0.5, 0.4, 0.3), degrees=(-30, 30))
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(60):
        choices = transform.choose(label.shape, rng)
        size = scaled_size(label.shape, choices.factor)
        whole = transform.augment(image, label, choices, Window(0, size[0], 0, size[1]))
        top, left = (int(rng.integers(extent)) for extent in size)
        window = Window(top, int(rng.integers(top, size[0])) + 1, left, int(rng.integers(left, size[1])) + 1)
        part, part_label = transform.augment(image, label, choices, window)
        np.testing.assert_array_equal(part_label, whole[1][window.slices], err_msg=str((choices, window)))
        np.testing.assert_allclose(part, whole[0][window.slices], rtol=0, atol=1e-4, err_msg=str((choices, window)))
        kinds.add((choices.degrees is None, choices.blur, choices.flip))
    assert len(kinds) == 8


@pytest.mark.parametrize(("height", "width", "crop"), [case for case in CASES if min(case[:2]) > 3])
def test_pixels_are_those_of_opencvs_functions_on_whole_images(height: int, width: int, crop: tuple[int, int]) -> None:
    image, label = photograph(height, width)
    transform = TrainTransform(crop, mean=(0.5, 0.4, 0.3), std=(1 / 255,) * 3)
    wrong = 0
    for seed in range(40):
        expected, expected_label = semseg_transforms.augment(
            transform, image.astype(np.float32), label, np.random.default_rng(seed)
        )
        output, target = transform(image, label, np.random.default_rng(seed))
        found = output.permute(1, 2, 0).numpy() + 255 * np.float32(transform.mean)
        np.testing.assert_allclose(found, expected, atol=LEVELS)
        wrong += int((target.numpy() != expected_label).sum())
    assert wrong <= 1e-3 * 40 * crop[0] * crop[1]  # turned labels at ties


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pixels_as_files_hold_them(dtype: type) -> None:
    image, label = photograph(50, 60)
    stored = image.astype(dtype) * dtype(257 if dtype is np.uint16 else 1)
    transform = TrainTransform((40, 40))
    expected = transform(image, label, np.random.default_rng(4))
    output = transform(stored, label, np.random.default_rng(4))
    torch.testing.assert_close(output[0], expected[0], atol=0, rtol=0)
    assert torch.equal(output[1], expected[1])
    assert torch.equal(
        EvalTransform()(stored, label, np.random.default_rng())[0], normalise(image, IMAGENET_MEAN, IMAGENET_STD)
    )


def test_a_crop_is_computed_from_the_pixels_that_it_needs() -> None:
    image, label = photograph(60, 60)
    transform = TrainTransform((8, 8), blur=False, scale=(2, 2), degrees=(0, 0))
    choices = Choices(2.0, None, False, False, 0, 0)
    image[20:], image[:, 20:] = 0, 0
    window = Window(0, 8, 0, 8)
    before = transform.augment(image, label, choices, window)[0]
    image[5:], image[:, 5:] = 255, 255  # all but what eight pixels at twice the size touch
    np.testing.assert_array_equal(transform.augment(image, label, choices, window)[0], before)


def test_training_pair_stays_aligned_through_the_pipeline() -> None:
    label = np.zeros((60, 80), np.uint8)
    label[:30, 40:], label[30:, :40], label[30:, 40:] = 1, 2, 3
    image = np.stack([label * 80.0] * 3, -1).astype(np.float32)
    transform = TrainTransform((48, 64), mean=(0, 0, 0), std=(1, 1, 1))
    corners = set()
    for output, target in results(lambda rng: transform(image, label, rng)):
        assert output.shape == (3, 48, 64)
        assert output.dtype == torch.float32
        assert target.shape == (48, 64)
        assert target.dtype == torch.int64
        known = target != 255
        agrees = (output[0][known] * 255 / 80 - target[known]).abs() < 0.5
        assert agrees.float().mean() > 0.85  # all but the blurred edges between the blocks
        corners.add(int(target[24, 32]))
    assert corners >= {0, 1, 2, 3}


@pytest.mark.parametrize("blur", [True, False])
def test_blur_is_part_of_the_pipeline_unless_turned_off(blur: bool) -> None:
    point, label = np.zeros((9, 9, 3), np.float32), np.zeros((9, 9), np.uint8)
    point[4, 4] = 255
    transform = TrainTransform((9, 9), mean=(0, 0, 0), std=(1, 1, 1), scale=(1, 1), degrees=(0, 0), blur=blur)
    peaks = {round(float(output.max()), 3) for output, _ in results(lambda rng: transform(point, label, rng))}
    assert peaks == ({1.0, 0.141} if blur else {1.0})


def test_crop_offsets_reach_both_ends() -> None:
    image, label = pair(3, 5)
    transform = TrainTransform((2, 2), scale=(1, 1), degrees=(0, 0), blur=False)
    found = {int(target.min()) for _, target in results(lambda rng: transform(image, label, rng), 200)}
    assert found == {0, 1, 2, 3, 5, 6, 7, 8}


def test_small_training_images_are_padded_with_mean_and_ignored() -> None:
    image, label = pair(4, 4)
    transform = TrainTransform((9, 9), scale=(1, 1), degrees=(0, 0), blur=False)
    output, target = transform(image, label, np.random.default_rng(0))
    assert (target == 255).sum() == 81 - 16
    torch.testing.assert_close(output[:, target == 255], torch.zeros(3, 65), atol=1e-6, rtol=0)


def test_equal_generators_give_equal_results() -> None:
    image, label = pair(12, 12)
    transform = TrainTransform((8, 8))
    first, again, other = (transform(image, label, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_evaluation_keeps_the_image_whole_or_takes_its_centre() -> None:
    image, label = pair(5, 6)
    rng = np.random.default_rng(0)
    assert EvalTransform()(image, label, rng)[1].tolist() == label.tolist()
    assert EvalTransform(crop=(1, 2))(image, label, rng)[1].tolist() == [[14, 15]]
    assert EvalTransform(crop=(7, 6))(image, label, rng)[1][:, 0].tolist() == [255, 0, 6, 12, 18, 24, 255]
