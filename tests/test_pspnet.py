"""PSPNet: semseg's names and shapes, forward, layouts, errors."""

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from toy_backbone import ToyBackbone

from pspnet_fast import UpsampleCrossEntropyLoss
from pspnet_fast import head as heads
from pspnet_fast.models import PSPNet
from pspnet_fast.models.small import SmallBackbone

Shape = tuple[int, ...]


def batch_norm(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    for entry in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{entry}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def semseg_table(blocks: tuple[int, int, int, int], classes: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a PSPNet checkpoint of hszhao/semseg, written from its files' listing."""
    for conv, bn, shape in ((0, 1, (64, 3, 3, 3)), (3, 4, (64, 64, 3, 3)), (6, 7, (128, 64, 3, 3))):
        yield f"layer0.{conv}.weight", shape
        yield from batch_norm(f"layer0.{bn}", shape[0])
    inputs = 128
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            yield f"{prefix}.conv1.weight", (width, inputs, 1, 1)
            yield f"{prefix}.conv2.weight", (width, width, 3, 3)
            yield f"{prefix}.conv3.weight", (4 * width, width, 1, 1)
            for number, channels in ((1, width), (2, width), (3, 4 * width)):
                yield from batch_norm(f"{prefix}.bn{number}", channels)
            if block == 0:
                yield f"{prefix}.downsample.0.weight", (4 * width, inputs, 1, 1)
                yield from batch_norm(f"{prefix}.downsample.1", 4 * width)
            inputs = 4 * width
    for level in range(4):
        yield f"ppm.features.{level}.1.weight", (512, 2048, 1, 1)
        yield from batch_norm(f"ppm.features.{level}.2", 512)
    for head, inputs, width in (("cls", 4096, 512), ("aux", 1024, 256)):
        yield f"{head}.0.weight", (width, inputs, 3, 3)
        yield from batch_norm(f"{head}.1", width)
        yield f"{head}.4.weight", (classes, width, 1, 1)
        yield f"{head}.4.bias", (classes,)


@pytest.mark.parametrize(("name", "blocks"), [("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))])
def test_names_and_shapes_are_those_of_semseg(name: str, blocks: tuple[int, int, int, int]) -> None:
    with torch.device("meta"):
        model = PSPNet(150, name)
    expected = dict(semseg_table(blocks, 150))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    if name == "resnet50":
        assert len(expected) == 370
        assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}" == "49.18"


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (41, 56), (64, 65)])
def test_logits_at_feature_resolution(size: tuple[int, int]) -> None:
    model = PSPNet(5, "resnet18", stem="conv7").eval()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, *size))
    assert list(outputs) == ["out"]
    assert outputs["out"].shape == (2, 5, -(-size[0] // 8), -(-size[1] // 8))


def test_auxiliary_logits_in_training_only() -> None:
    image = torch.randn(2, 3, 33, 33)
    model = PSPNet(5, ToyBackbone())
    assert model.train()(image)["aux"].shape == model(image)["out"].shape
    assert "aux" not in model.eval()(image)
    assert "aux" not in PSPNet(5, ToyBackbone(), aux=False).train()(image)


def test_backbone_module_becomes_children() -> None:
    backbone = ToyBackbone()
    model = PSPNet(3, backbone)
    assert model.layer4 is backbone.layer4
    assert model.cls[0].in_channels == 8 + 4 * 2
    assert model.cls[0].out_channels == model.aux[0].out_channels == 2
    assert PSPNet(3, ToyBackbone(), head_channels=7).cls[0].out_channels == 7


def test_without_bins_there_is_no_pyramid() -> None:
    model = PSPNet(3, ToyBackbone(), bins=None)
    assert model.cls[0].in_channels == 8
    assert not [name for name in model.state_dict() if name.startswith("ppm")]
    assert model.eval()(torch.randn(1, 3, 9, 9))["out"].shape == (1, 3, 3, 3)


def test_pyramid_sees_the_whole_image() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[..., -8:, -8:] += 1
    for bins, sees in (((1,), True), (None, False)):
        model = PSPNet(3, ToyBackbone(), bins=bins).eval()
        with torch.no_grad():
            difference = (model(image)["out"] - model(changed)["out"])[..., 0, 0].abs().max()
        assert bool(difference > 0) == sees


def test_channels_last_equals_contiguous() -> None:
    torch.manual_seed(0)
    model = PSPNet(5, "resnet18", stem="conv7").eval()
    image = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        expected = model(image)["out"]
        model.to(memory_format=torch.channels_last)
        actual = model(image.to(memory_format=torch.channels_last))["out"]
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_trains() -> None:
    torch.manual_seed(0)
    model = PSPNet(5, ToyBackbone()).train()
    image = torch.randn(2, 3, 40, 56)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(image)
    assert outputs["out"].dtype == torch.bfloat16
    (outputs["out"].float().square().mean() + outputs["aux"].float().square().mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must satisfy 0 <= dropout < 1, got 1.0"),
        ({"head_channels": 0}, "head_channels must be None or at least 1, got 0"),
        ({"reduction_channels": 0}, "reduction_channels must be None or at least 1, got 0"),
        ({"bottleneck_kernel": 2}, "bottleneck_kernel must be odd and at least 1, got 2"),
        ({"classifier_kernel": -1}, "classifier_kernel must be odd and at least 1, got -1"),
        ({"concat": "last"}, "concat must be one of 'input_first', 'input_last', but is 'last'"),
        ({"stages": 2, "output_stride": 16}, "output_stride must be at most 8 with stages=2, is 16"),
        ({"backbone": nn.Identity()}, "lacks layer0, layer1, layer2, layer3, layer4, out_channels"),
        ({"backbone": "vgg"}, "backbone must be one of .* got 'vgg'"),
        ({"stem": "deep"}, "stem must be one of .* got 'deep'"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PSPNet(**{"classes": 3, "backbone": "resnet18", **arguments})


SMP = {"stages": 2, "concat": "input_last", "bin1_norm": False, "bottleneck_kernel": 1, "classifier_kernel": 3}


@pytest.mark.parametrize(
    "arguments", [{}, {"backbone": "resnet18", "stem": "conv7", "bins": None, "aux": False}, SMP, {"avg_down": True}]
)
def test_config_builds_the_model_again(arguments: dict) -> None:
    with torch.device("meta"):
        model = PSPNet(5, **arguments)
        again = PSPNet(model.classes, **model.config)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (model, again)]
    assert shapes[0] == shapes[1]
    assert again.config == model.config
    assert model.config is not None
    assert model.config.keys() == set(inspect.signature(PSPNet).parameters) - {"classes", "norm_layer"}


@pytest.mark.parametrize("training", [False, True])
def test_the_heads_of_other_packages_run_fused(
    training: bool, small_maps_as_large_ones: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And give what the concatenation gives: a 1x1 bottleneck, a level with a bias and no norm, the features last."""
    fused, concat = (
        PSPNet(3, "resnet18", stem="conv7", head=name, dropout=0, **SMP).double().train(training)  # type: ignore[arg-type]
        for name in ("fused", "concat")
    )
    nn.init.normal_(fused.ppm.features[0][1].bias)
    concat.load_state_dict(fused.state_dict())
    image = torch.randn(2, 3, 64, 72, dtype=torch.float64)
    runs, run = [], heads._fused
    monkeypatch.setattr(heads, "_fused", lambda *arguments: runs.append(1) or run(*arguments))
    ours, expected = fused(image), concat(image)
    assert len(runs) == 1
    assert ours.keys() == expected.keys() == ({"out", "aux"} if training else {"out"})
    assert ours["out"].shape == (2, 3, 8, 9)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


def test_config_of_what_is_no_plain_data() -> None:
    assert PSPNet(2, ToyBackbone()).config is None
    with torch.device("meta"):
        assert PSPNet(2, "resnet18", norm_layer=lambda channels: nn.GroupNorm(1, channels)).config is None


def test_twenty_training_steps_give_the_same_bits(device):
    """In deterministic mode, the loss of upsampled logits included; on a GPU with a ResNet."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (trained(device, steps=20) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["cls.4.weight"], trained(device, steps=19)["cls.4.weight"])


def trained(device: torch.device, steps: int) -> dict[str, torch.Tensor]:
    """What a model's state is after so many steps."""
    torch.manual_seed(0)
    backbone = "resnet50" if device.type == "cuda" else SmallBackbone(width=16)
    model = PSPNet(5, backbone).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = UpsampleCrossEntropyLoss()
    for _ in range(steps):
        images, target = torch.randn(2, 3, 65, 57, device=device), torch.randint(5, (2, 65, 57), device=device)
        outputs = model(images)
        optimizer.zero_grad()
        (loss(outputs["out"], target) + 0.4 * loss(outputs["aux"], target)).backward()
        optimizer.step()
    return model.state_dict()
