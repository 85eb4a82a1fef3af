"""Transforms against their definition in semseg, on arrays small enough to check by eye."""

import numpy as np
import pytest
import torch

from pspnet_fast.data.transforms import (
    EvalTransform,
    TrainTransform,
    normalise,
    pad_to,
    random_blur,
    random_flip,
    random_rotate,
    random_scale,
)

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


def test_scale_resizes_both_by_one_factor() -> None:
    image, label = pair(10, 20)
    for scaled, scaled_label in results(lambda rng: random_scale(image, label, rng, (0.5, 2.0))):
        assert scaled.shape[:2] == scaled_label.shape
        assert scaled_label.shape[1] == pytest.approx(2 * scaled_label.shape[0], abs=2)
        assert set(scaled_label.flat) <= set(label.flat)
    heights = {result.shape[0] for result, _ in results(lambda rng: random_scale(image, label, rng, (0.5, 2.0)))}
    assert 5 <= min(heights) < 8
    assert 17 < max(heights) <= 20


def test_rotation_turns_half_of_the_images_and_fills_with_the_border() -> None:
    image, label = np.full((40, 60, 3), 200, np.float32), np.ones((40, 60), np.uint8)
    turned = 0
    for rotated, rotated_label in results(lambda rng: random_rotate(image, label, rng, (8, 10), BORDER)):
        assert rotated.shape == image.shape
        if (rotated_label == 255).any():
            turned += 1
            assert set(rotated_label.flat) == {1, 255}
            np.testing.assert_allclose(rotated[0, 0], BORDER)
            assert rotated[20, 30].tolist() == [200] * 3
    assert 10 < turned < 30


def test_rotation_is_counter_clockwise_by_positive_degrees() -> None:
    label = np.zeros((41, 41), np.uint8)
    label[18:23, 30:] = 1  # a bar to the right of the centre
    image = np.zeros((41, 41, 3), np.float32)
    turned = [result for _, result in results(lambda rng: random_rotate(image, label, rng, (45, 45), BORDER))]
    rotated = next(result for result in turned if (result == 255).any())
    rows, columns = np.nonzero(rotated == 1)
    assert rows.mean() < 15
    assert columns.mean() > 25


def test_blur_keeps_flat_images_and_smooths_half_of_the_others() -> None:
    point = np.zeros((9, 9, 3), np.float32)
    point[4, 4] = 100
    peaks = [blurred[4, 4, 0] for blurred in results(lambda rng: random_blur(point, rng))]
    assert sorted({float(peak) for peak in peaks}) == [pytest.approx(100 * (6 / 16) ** 2), 100]
    assert 10 < sum(peak < 100 for peak in peaks) < 30


def test_flip_mirrors_half_of_the_images() -> None:
    image, label = pair(2, 3)
    flipped = 0
    for mirrored, mirrored_label in results(lambda rng: random_flip(image, label, rng)):
        assert mirrored[..., 0].tolist() == mirrored_label.tolist()
        flipped += mirrored_label.tolist() == [[2, 1, 0], [5, 4, 3]]
    assert 10 < flipped < 30


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
