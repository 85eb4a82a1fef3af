"""Backbones: dilations, strides, stems, errors."""

import pytest
import torch
from torch import nn

from pspnet_fast.models import resnet


def dilations(stage: nn.Module) -> list[int]:
    return [conv.dilation[0] for conv in stage.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]


@pytest.mark.parametrize(
    ("dilation", "output_stride", "layer3", "layer4"),
    [
        ("full", 8, [2] * 6, [4] * 3),  # semseg
        ("contracted", 8, [1] + [2] * 5, [2] + [4] * 2),  # torchvision, mmseg
        ("full", 16, [1] * 6, [2] * 3),
        ("contracted", 16, [1] * 6, [1] + [2] * 2),
        ("full", 32, [1] * 6, [1] * 3),
    ],
)
def test_dilations_of_resnet50(dilation: str, output_stride: int, layer3: list[int], layer4: list[int]) -> None:
    with torch.device("meta"):
        model = resnet("resnet50", dilation=dilation, output_stride=output_stride)
    assert dilations(model.layer2) == [1] * 4
    assert dilations(model.layer3) == layer3
    assert dilations(model.layer4) == layer4


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_contracted_dilation_samples_the_strided_network_on_a_finer_grid(name: str) -> None:
    fine = resnet(name, stem="conv7", dilation="contracted", output_stride=8).eval()
    coarse = resnet(name, stem="conv7", dilation="contracted", output_stride=16).eval()
    coarse.load_state_dict(fine.state_dict())
    image = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        torch.testing.assert_close(fine(image)[..., ::2, ::2], coarse(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (33, 47), (64, 65)])
def test_features_cover_any_size(size: tuple[int, int], output_stride: int) -> None:
    model = resnet("resnet18", stem="conv7", output_stride=output_stride).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, *size))
    assert features.shape == (1, 512, *(-(-extent // output_stride) for extent in size))


@pytest.mark.parametrize(("stem", "widths"), [("deep64", [64, 64, 128]), ("deep32", [32, 32, 64]), ("conv7", [64])])
def test_stems(stem: str, widths: list[int]) -> None:
    model = resnet("resnet18", stem=stem)
    convolutions = [layer for layer in model.layer0 if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == widths
    assert model.layer0(torch.zeros(2, 3, 32, 32)).shape == (2, widths[-1], 8, 8)


@pytest.mark.parametrize(
    ("name", "blocks", "out_channels"),
    [
        ("resnet18", [2, 2, 2, 2], (256, 512)),
        ("resnet34", [3, 4, 6, 3], (256, 512)),
        ("resnet50", [3, 4, 6, 3], (1024, 2048)),
        ("resnet101", [3, 4, 23, 3], (1024, 2048)),
        ("resnet152", [3, 8, 36, 3], (1024, 2048)),
    ],
)
def test_depths(name: str, blocks: list[int], out_channels: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = resnet(name)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == blocks
    assert model.out_channels == out_channels


@torch.no_grad()
def test_avg_down_pools_what_is_there() -> None:
    """Where a side is odd the last row is the mean of itself alone: the shortcut of constants is constant."""
    shortcut = resnet("resnet18", stem="conv7", avg_down=True).layer2[0].downsample
    pooled = shortcut[0](torch.arange(15.0).view(1, 1, 3, 5))
    assert pooled[0, 0].tolist() == [[3, 5, 6.5], [10.5, 12.5, 14]]
    assert isinstance(resnet("resnet50", avg_down=True).layer3[0].downsample[0], nn.Identity)  # no stride, no pooling


def test_convolutions_start_kaiming_normal() -> None:
    torch.manual_seed(0)
    weight = resnet("resnet18").layer3[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    # fourth over squared second moment: 3 for a normal distribution, 1.8 for a uniform one
    assert (weight**4).mean() / weight.var() ** 2 > 2.9


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("stem", "deep", "'deep64', 'deep32', 'conv7'"),
        ("dilation", "none", "'full', 'contracted'"),
        ("output_stride", 64, "8, 16, 32"),
        ("stages", 1, "2, 3, 4"),
    ],
)
def test_errors_name_argument_value_and_allowed(argument: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be one of {allowed}, got {value!r}"):
        resnet("resnet18", **{argument: value})


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match=r"backbone must be one of 'resnet18'.* got 'resnet20'"):
        resnet("resnet20")
