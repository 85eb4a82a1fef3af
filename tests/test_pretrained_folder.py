"""save_pretrained, from_pretrained and push_to_hub; the Hub is never reached."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_backbone import ToyBackbone

from pspnet_fast.models import PSPNet
from pspnet_fast.models.folder import FILES

SMALL: dict[str, Any] = {"backbone": "resnet18", "stages": 2, "head_channels": 4, "reduction_channels": 4, "aux": False}
METADATA = {"class_names": ["a", "b", "ü"], "colors": [[1, 2, 3]] * 3, "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture
def model() -> PSPNet:
    model = PSPNet(3, **SMALL)
    model.metadata = dict(METADATA)
    return model


def test_there_and_back(tmp_path: Path, model: PSPNet) -> None:
    folder = tmp_path / "new" / "model"
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    again = PSPNet.from_pretrained(folder)
    assert (again.config, again.metadata, again.training) == (model.config, METADATA, False)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(FileExistsError, match=r"holds config.json, model.safetensors, README.md already"):
        model.save_pretrained(folder)
    model.metadata = {}
    model.save_pretrained(str(folder), overwrite=True)
    assert PSPNet.from_pretrained(str(folder)).metadata == {}


def test_what_is_no_plain_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config to save"):
        PSPNet(3, ToyBackbone()).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "describes no model of pspnet_fast"),
        ({"format": 2}, "is of format 2; this version reads 1"),
        ({"image": {"color_order": "BGR"}}, "image.color_order must be 'RGB', is 'BGR'"),
        ({"image": {"scale": 1}}, "image.scale must be 0.0039"),
        ({"image": []}, r"image must be a mapping, is \[\]"),
        ({"classes": "many"}, "classes must be a number, is 'many'"),
        ({"classes": 4}, "its weights are not those of the PSPNet it describes"),
        ({"model": {"backbone": "resnet18", "legs": 4}}, "its weights are not those of the PSPNet .*'legs'"),
        ({"model": {**SMALL, "stages": 7}}, "stages must be one of 2, 3, 4, got 7"),
    ],
)
def test_other_configurations(tmp_path: Path, model: PSPNet, change: dict[str, Any], message: str) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        PSPNet.from_pretrained(tmp_path)


def test_damaged_folders(tmp_path: Path, model: PSPNet) -> None:
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model.safetensors: is damaged"):
        PSPNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: is damaged, no JSON"):
        PSPNet.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*model.safetensors; expected a folder of config.json"):
        PSPNet.from_pretrained(tmp_path)
    for name in ("nowhere", "/no/such/folder", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"no folder {name}, and no name of the Hub"):
            PSPNet.from_pretrained(name)


def test_without_the_packages(tmp_path: Path, model: PSPNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model.save_pretrained(tmp_path)
    assert PSPNet.from_pretrained(tmp_path).metadata == METADATA
    for call in (lambda: PSPNet.from_pretrained("owner/model"), lambda: model.push_to_hub("owner/model")):
        with pytest.raises(ModuleNotFoundError, match=r"huggingface_hub: pip install 'pspnet_fast\[hub\]'"):
            call()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"safetensors: pip install 'pspnet_fast\[hub\]'"):
        model.save_pretrained(tmp_path, overwrite=True)


def test_the_hub(tmp_path: Path, model: PSPNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client's own steps, up to what would be sent and fetched."""
    huggingface_hub, hub_mixin = (importlib.import_module(f"huggingface_hub{name}") for name in ("", ".hub_mixin"))
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            sent["private"] = private
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            sent["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return f"https://example.org/{repo_id}"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    assert model.push_to_hub("owner/model", private=True, token="t") == "https://example.org/owner/model"
    assert (sent["token"], sent["private"], sorted(sent["files"])) == ("t", True, sorted(FILES))
    for name, content in sent["files"].items():
        (tmp_path / name).write_bytes(content)
    asked: list[Any] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    again = PSPNet.from_pretrained("owner/model", revision="v1")
    assert asked == [("owner/model", "v1", ["config.json", "model.safetensors"])]
    assert again.metadata == METADATA
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
