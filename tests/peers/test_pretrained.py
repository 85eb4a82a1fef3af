"""Weights of real models of timm and torchvision, random ones: the same features."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from pspnet_fast.models import PSPNet, load_backbone

PACKAGES = ("torchvision", "segmentation_models_pytorch", "timm", "transformers", "safetensors")
if MISSING := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{', '.join(MISSING)} not installed: make test-peers", allow_module_level=True)

import packages  # noqa: E402, F401  # makes torchvision importable
import timm  # noqa: E402
import torchvision  # noqa: E402
from packages import randomise  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


@pytest.mark.parametrize(
    ("name", "stem", "layout"),
    [
        ("resnet18", "conv7", "torchvision or timm"),
        ("resnet50", "conv7", "torchvision or timm"),
        ("resnet50s", "deep64", "timm"),
        ("resnet50c", "deep32", "timm"),
        ("resnet101", "conv7", "torchvision or timm"),
    ],
)
def test_timm(tmp_path: Path, name: str, stem: str, layout: str) -> None:
    theirs = randomise(timm.create_model(name, pretrained=False, output_stride=8))
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    model = PSPNet(5, name.rstrip("sc"), stem=stem, dilation="contracted").eval()
    loaded = load_backbone(model, tmp_path / "weights.safetensors")
    assert (loaded.layout, loaded.skipped, loaded.missing) == (layout, ["fc.bias", "fc.weight"], [])
    assert_same_features(model, theirs.forward_features)


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_torchvision(tmp_path: Path, name: str) -> None:
    theirs = randomise(getattr(torchvision.models, name)(replace_stride_with_dilation=[False, True, True]))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = PSPNet(5, name, stem="conv7", dilation="contracted").eval()
    assert load_backbone(model, tmp_path / "weights.pth").skipped == ["fc.bias", "fc.weight"]
    assert_same_features(model, nn.Sequential(*list(theirs.children())[:-2]))


def test_pooling_shortcuts(tmp_path: Path) -> None:
    """ResNet-D as it was trained; timm's own dilated form pools with stride 1 where a stride was taken out."""
    theirs = randomise(timm.create_model("resnet50d", pretrained=False))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"pools in its shortcuts, .* choose model.avg_down=true"):
        load_backbone(PSPNet(5, stem="deep32"), tmp_path / "weights.pth")
    model = PSPNet(5, stem="deep32", avg_down=True, output_stride=32).eval()
    load_backbone(model, tmp_path / "weights.pth")
    assert_same_features(model, theirs.forward_features, (3, 4))


@torch.inference_mode()
def assert_same_features(model: PSPNet, theirs: nn.Module, size: tuple[int, int] = (9, 13)) -> None:
    image = torch.randn(1, 3, 65, 97)
    features = image
    for layer in (model.layer0, model.layer1, model.layer2, model.layer3, model.layer4):
        features = layer(features)
    expected = theirs(image)
    assert features.shape == expected.shape == (1, features.size(1), *size)
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
