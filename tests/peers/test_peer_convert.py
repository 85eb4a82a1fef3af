"""convert on weights of segmentation_models_pytorch, torchvision and timm themselves, random ones."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

PACKAGES = ("torchvision", "segmentation_models_pytorch", "timm", "transformers", "safetensors")
if MISSING := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{', '.join(MISSING)} not installed: make test-peers", allow_module_level=True)

import packages  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402
from packages import randomise  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from pspnet_fast.convert import convert, selftest  # noqa: E402
from pspnet_fast.models import PSPNet  # noqa: E402

DEPTH5 = {"encoder_depth": 5, "output_stride": 8}


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder", "arguments"),
    [("resnet18", {}), ("resnet18", DEPTH5), ("resnet50", {}), ("resnet50", DEPTH5)],
    ids=["18, depth 3", "18, depth 5", "50, depth 3", "50, depth 5"],
)
def test_smp(tmp_path: Path, encoder: str, arguments: dict[str, int]) -> None:
    theirs = randomise(packages.of_smp("PSPNet", encoder, **arguments))
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"model.{name}": value for name, value in theirs.state_dict().items()}}, path)
    model, report = convert(path)
    model.save_pretrained(tmp_path / "model")
    model = PSPNet.from_pretrained(tmp_path / "model")
    image = torch.randn(1, 3, 64, 128)
    ours = F.interpolate(model(image)["out"], image.shape[2:], mode="bilinear", align_corners=True)
    expected = theirs(image)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert report.self_test.startswith("segmentation_models_pytorch 0.")
    assert "assumed: align_corners=True" in str(report)
    deep = bool(arguments)
    assert (len(report.dropped) == 0) == deep
    assert ("assumed: dilation=full" in str(report)) == deep
    assert deep or set(report.dropped.values()) == {"behind layer2, where the pyramid stands"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet50", "resnet50s", "resnet50c", "resnet50d"])
def test_timm(tmp_path: Path, name: str) -> None:
    theirs = randomise(timm.create_model(name, pretrained=False))
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    model, report = convert(tmp_path / "weights.safetensors", "timm", classes=4)
    assert report.self_test.startswith("timm 1.")
    assert model.config is not None
    assert (model.config["dilation"], model.config["avg_down"]) == ("contracted", name == "resnet50d")
    assert report.dropped.keys() == {"fc.weight", "fc.bias"}
    assert "backbone alone" in str(report)


@torch.no_grad()
def test_torchvision_segmentation(tmp_path: Path) -> None:
    """Backbone and auxiliary head; what stands on layer4 is no pyramid."""
    theirs = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    randomise(theirs)
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    model, report = convert(tmp_path / "weights.pth")
    assert (report.source, model.classes) == ("torchvision", 21)
    assert report.self_test.startswith("torchvision 0.")
    assert set(report.dropped.values()) == {"the head of FCN or DeepLab, which is no pyramid"}
    image = torch.randn(1, 3, 65, 65)
    features = model.layer3(model.layer2(model.layer1(model.layer0(image))))
    expected = theirs(image)["aux"]
    assert isinstance(model.aux, nn.Module)
    ours = F.interpolate(model.aux(features), image.shape[2:], mode="bilinear", align_corners=False)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_smp_of_one_output(tmp_path: Path) -> None:
    """As its examples train it, with the normalisation that their module holds."""
    theirs = randomise(packages.of_smp("PSPNet", "resnet18", 1))
    state = {f"model.{name}": value for name, value in theirs.state_dict().items()} | {"mean": torch.ones(1, 3, 1, 1)}
    torch.save({"state_dict": state}, tmp_path / "weights.ckpt")
    model, report = convert(tmp_path / "weights.ckpt")
    assert model.classes == 2
    assert "the same outputs" in report.self_test
    assert "the training script's normalisation" in report.dropped["mean"]


def test_a_wrong_result_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the self-test, should a table here be wrong."""
    theirs = randomise(packages.of_smp("PSPNet", "resnet18"))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    real = selftest.PSPNet.forward
    monkeypatch.setattr(selftest.PSPNet, "forward", lambda *x: {"out": real(*x)["out"] * 1.001})
    with pytest.raises(ValueError, match=r"self-test: segmentation_models_pytorch's own model gives other outputs"):
        convert(tmp_path / "weights.pth")
