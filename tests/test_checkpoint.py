"""Checkpoints are plain data, written whole or not at all."""

from pathlib import Path

import pytest
import torch

from pspnet_fast.training.checkpoint import load_checkpoint, save_checkpoint


def test_round_trip(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.arange(3.0)}, "history": [{"miou": 0.5, "iou": [0.5, float("nan")]}]}
    save_checkpoint(tmp_path / "c.pt", state)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded["model"]["weight"], torch.arange(3.0))
    assert loaded["history"][0]["miou"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_failed_write_keeps_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})

    def interrupted(state: object, file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*c.pt"):
        load_checkpoint(tmp_path / "c.pt")


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"c.pt: is damaged or no checkpoint"):
        load_checkpoint(path)


def test_file_with_code(tmp_path: Path) -> None:
    torch.save({"format": 1, "model": torch.nn.Linear(1, 1)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c.pt: is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "c.pt")


def test_file_of_another_program(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c.pt: is no checkpoint of pspnet_fast \(format 1\)"):
        load_checkpoint(tmp_path / "c.pt")
