import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast.data.scenes import BAND, CLASSES, COLORS, MEAN, MIN_SIZE, STD, SceneDataset, draw_scene
from pspnet_fast.models import PSPNet
from pspnet_fast.models.small import SmallBackbone, reach, receptive_field

SIZE = (145, 193)
BOAT, CAR = CLASSES.index("boat"), CLASSES.index("car")
WATER, ROAD = CLASSES.index("water"), CLASSES.index("road")


def fcn() -> PSPNet:
    return PSPNet(len(CLASSES), SmallBackbone(16), bins=None, aux=False)


def layers(model: PSPNet) -> list[nn.Module]:
    return [model.layer0, model.layer1, model.layer2, model.layer3, model.layer4, model.cls]


def upsampled(model: nn.Module, images: Tensor) -> Tensor:
    return F.interpolate(model(images)["out"], images.shape[-2:], mode="bilinear", align_corners=True)


def near_hull(label: np.ndarray) -> np.ndarray:
    """Pixels of the hull and those at most BAND pixels away from one of them."""
    elsewhere = (~np.isin(label, (BOAT, CAR))).astype(np.uint8)
    return cv2.distanceTransform(elsewhere, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= BAND


def test_drawing_depends_on_seed_and_index_alone() -> None:
    first, again = SceneDataset(SIZE, 4, seed=3), SceneDataset(SIZE, 8, seed=3)
    for index in (2, 0, 3, 1):
        for one, other in zip(first[index], again[index], strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(first[0][0], first[2][0])
    assert not torch.equal(first[0][0], SceneDataset(SIZE, 1, seed=4)[0][0])


@pytest.mark.parametrize("size", [MIN_SIZE, (161, 241)])
def test_twins_share_the_hull_and_the_band_and_differ_around(size: tuple[int, int]) -> None:
    for pair in range(20):
        boat, car = draw_scene(size, 2 * pair), draw_scene(size, 2 * pair + 1)
        hull = boat.label == BOAT
        assert np.array_equal(hull, car.label == CAR)
        assert not np.isin(boat.label, (CAR, ROAD)).any()
        assert not np.isin(car.label, (BOAT, WATER)).any()
        near = near_hull(boat.label)
        assert np.array_equal(boat.picture[near], car.picture[near])
        assert (boat.label[near & ~hull] == CLASSES.index("mist")).all()
        around = boat.label == WATER
        assert around.mean() > 0.03
        assert np.abs(boat.picture[around].astype(int) - car.picture[around]).mean() > 10


def test_hull_lies_in_its_box_inside_the_picture() -> None:
    for index in range(20):
        _, label, box = draw_scene(MIN_SIZE, index)
        rows, columns = np.nonzero(np.isin(label, (BOAT, CAR)))
        assert abs(rows - box.y).max() <= box.half_height
        assert abs(columns - box.x).max() <= box.half_length
        assert len(rows) > 0.4 * 4 * box.half_height * box.half_length


def test_items() -> None:
    scenes = SceneDataset(SIZE, 12)
    assert len(scenes) == 12
    image, label = scenes[5]
    assert image.shape == (3, *SIZE)
    assert image.dtype == torch.float32
    assert label.shape == SIZE
    assert label.dtype == torch.int64
    picture = ((image * STD + MEAN) * 255).permute(1, 2, 0).round().to(torch.uint8)
    assert np.array_equal(picture.numpy(), scenes.scene(5).picture)
    assert set(np.unique([scenes[index][1] for index in range(12)])) == set(range(len(CLASSES)))
    assert len(set(COLORS)) == len(COLORS) == len(CLASSES)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"size .* at least \(145, 193\), got \(144, 193\)"):
        draw_scene((144, 193), 0)
    with pytest.raises(ValueError, match=r"size .* got \(145, 192\)"):
        SceneDataset((145, 192), 1)
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        SceneDataset(SIZE, -1)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"index must be in 0..1, got {index}"):
            SceneDataset(SIZE, 2)[index]
    with pytest.raises(ValueError, match=r"must be square, got \(3, 5\)"):
        receptive_field([nn.Conv2d(1, 1, (3, 5))])


def test_receptive_field_by_hand() -> None:
    stem = nn.Sequential(nn.Conv2d(1, 1, 7, stride=2), nn.MaxPool2d(3, stride=2), nn.ReLU())
    assert receptive_field([stem]) == (11, 4)
    assert receptive_field([stem, nn.Conv2d(1, 1, 3, dilation=2)]) == (27, 4)
    assert receptive_field([SmallBackbone()]) == (23, 4)
    assert receptive_field(layers(fcn())) == (31, 4)


def test_fcn_sees_less_than_the_band() -> None:
    assert reach(layers(fcn())) < BAND


def test_reach_is_the_support_of_the_gradient() -> None:
    model = fcn().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().add_(0.1)  # nothing cancels and every ReLU passes
    middle = (torch.tensor(SIZE) // 2).tolist()
    seen = 0
    for shift in range(4):
        y, x = middle[0] + shift, middle[1] + shift
        image = torch.ones(1, 3, *SIZE, requires_grad=True)
        upsampled(model, image)[0, :, y, x].sum().backward()
        assert image.grad is not None
        rows, columns = image.grad[0].abs().sum(0).nonzero().T
        seen = max(seen, (rows - y).abs().max().item(), (columns - x).abs().max().item())
    assert seen == reach(layers(model))


def test_only_the_pyramid_can_tell_twins_apart() -> None:
    torch.manual_seed(0)
    scenes = SceneDataset((161, 241), 8)
    pyramid = PSPNet(len(CLASSES), SmallBackbone(16), aux=False)
    for model, blind in ((fcn(), True), (pyramid, False)):
        model.eval()
        for index in range(0, len(scenes), 2):
            images = torch.stack([scenes[index][0], scenes[index + 1][0]])
            hull = scenes[index][1] == BOAT
            with torch.inference_mode():
                boat, car = upsampled(model, images)[:, :, hull]
            difference = (boat - car).abs().max().item()
            scale = boat.abs().max().item()
            assert difference < 1e-5 * scale if blind else difference > 1e-2 * scale
