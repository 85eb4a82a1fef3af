"""Backbone weights in the names of others; tests/peers has those of real models."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pspnet_fast.models import PSPNet, load_backbone, resnet

State = dict[str, Tensor]
TIMM = {"0": "conv1.0", "1": "conv1.1", "3": "conv1.3", "4": "conv1.4", "6": "conv1.6", "7": "bn1"}
SEMSEG = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}


def rename(state: State, stem: dict[str, str]) -> State:
    def name(own: str) -> str:
        found = re.fullmatch(r"layer0\.(\d)\.(\w+)", own)
        return f"{stem[found[1]]}.{found[2]}" if found else own

    return {name(own): value for own, value in state.items()} | {"fc.weight": torch.ones(7, 512)}


def prefix(state: State, text: str) -> State:
    return {text + name: value for name, value in state.items()}


LAYOUTS: dict[str, tuple[str, str, Callable[[State], object]]] = {
    "torchvision": ("conv7", "torchvision or timm", lambda s: rename(s, {"0": "conv1", "1": "bn1"})),
    "timm s": ("deep64", "timm", lambda s: rename(s, TIMM)),
    "timm c": ("deep32", "timm", lambda s: rename(s, TIMM)),
    "semseg": ("deep64", "semseg", lambda s: {"state_dict": prefix(rename(s, SEMSEG), "module.")}),
    "mmsegmentation": (
        *("deep32", "mmsegmentation"),
        lambda s: {"meta": {}, "state_dict": prefix(rename(s, {i: f"stem.{i}" for i in TIMM}), "backbone.")},
    ),
    "own": ("deep64", "PSPNet", lambda s: {"model": {**s, "cls.4.weight": torch.ones(3)}}),
}


def weights(stem: str, name: str = "resnet18") -> State:
    torch.manual_seed(3)
    return {
        key: torch.rand_like(value.float()).to(value.dtype)
        for key, value in resnet(name, stem=stem).state_dict().items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    stem, layout, change = LAYOUTS[name]
    state = weights(stem)
    torch.save(change(dict(state)), tmp_path / "weights.pth")
    model = PSPNet(4, "resnet18", stem=stem)
    head = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("layer")}
    loaded = load_backbone(model, tmp_path / "weights.pth")
    assert loaded.layout == layout
    assert sorted(loaded.loaded) == sorted(state)
    assert (len(loaded.skipped), loaded.missing) == (1, [])
    assert "1 skipped (" in str(loaded)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key] if key in state else head[key])


def test_counters_may_be_missing(tmp_path: Path) -> None:
    """Of batch norms, which old versions of torch did not count."""
    state = {name: value for name, value in weights("deep64").items() if not name.endswith("tracked")}
    torch.save(state, tmp_path / "weights.pth")
    loaded = load_backbone(resnet("resnet18"), tmp_path / "weights.pth")
    assert loaded.missing
    assert all(name.endswith("num_batches_tracked") for name in loaded.missing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: rename(weights("conv7"), {"0": "conv1", "1": "bn1"}),
            "one convolution of 64 .* choose model.stem=conv7",
        ),
        (
            lambda: rename(weights("deep32"), TIMM),
            "3 convolutions of 32, 32, 64 .* is deep64; choose model.stem=deep32",
        ),
        (lambda: weights("deep64", "resnet34"), "is resnet34, the model's backbone is resnet18; choose model.backbone"),
        (lambda: weights("deep64", "resnet50"), "is resnet50, the model's backbone is resnet18"),
        (
            lambda: {k: v for k, v in weights("deep64").items() if k != "layer3.1.conv2.weight"},
            "layer3.1.conv2.weight: missing",
        ),
        (
            lambda: {**weights("deep64"), "layer2.0.downsample.2.weight": torch.ones(1)},
            "pools in .*avg_down=true",
        ),
        (lambda: {k: v for k, v in weights("deep64").items() if not k.startswith("layer0")}, "its stem is none"),
        (
            lambda: {"features.0.weight": torch.ones(1)},
            r"no layer1 to layer4 of a ResNet among its 1 entries \(features",
        ),
        (lambda: {"epoch": 3}, "holds no weights"),
        (lambda: torch.nn.Linear(1, 1), r"holds Python objects \(torch.nn.modules.linear.Linear\)"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, change: Callable[[], object], message: str) -> None:
    torch.save(change(), tmp_path / "weights.pth")
    model = resnet("resnet18")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"weights.pth.*{message}"):
        load_backbone(model, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights .*weights.pth"):
        load_backbone(resnet("resnet18"), tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_text("none")
    with pytest.raises(ValueError, match=r"weights.pth: is damaged or no checkpoint: a text file"):
        load_backbone(resnet("resnet18"), str(tmp_path / "weights.pth"))


def test_safetensors_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match=r"weights.safetensors: needs .* pip install 'pspnet_fast\[safetensors\]'"):
        load_backbone(resnet("resnet18"), tmp_path / "weights.safetensors")
