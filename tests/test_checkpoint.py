"""Checkpoints are plain data, written whole or not at all; what is none is called by its name."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from limits import largest_file

from pspnet_fast.training.checkpoint import load_checkpoint, save_checkpoint

STATE = {
    "model": {"weight": torch.arange(3000.0)},
    "class_names": ["a"],
    "metadata": {},
    "config": {},
    "step": 1,
    "steps": 2,
    "history": [{"miou": 0.5, "iou": [0.5, None]}],
}


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", STATE)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
    assert {key: loaded[key] for key in STATE if key != "model"} == {key: STATE[key] for key in STATE if key != "model"}
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_failed_write_keeps_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, STATE)

    def interrupted(state: object, file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {**STATE, "step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("before", [True, False])
def test_full_disk(tmp_path: Path, before: bool) -> None:
    path = tmp_path / "c.pt"
    if before:
        save_checkpoint(path, {**STATE, "model": {}})
    large = {**STATE, "model": {"weight": torch.zeros(500_000)}, "step": 2}
    with largest_file(100_000), pytest.raises(OSError, match="cannot be written") as error:
        save_checkpoint(path, large)
    assert error.value.filename == str(path)
    assert "2.0 MB needed" in error.value.strerror
    assert "MB free" in error.value.strerror
    assert ("the file before it is whole" in error.value.strerror) is before
    assert [entry.name for entry in tmp_path.iterdir()] == (["c.pt"] if before else [])
    if before:
        assert load_checkpoint(path)["step"] == 1


def test_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written") as error:
        save_checkpoint(tmp_path / "file" / "c.pt", STATE)
    assert error.value.filename == str(tmp_path / "file" / "c.pt")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*c.pt"):
        load_checkpoint(tmp_path / "c.pt")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    """One bit of the weights: torch would load it without a word."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "hello")


def other(state: object, **options: bool) -> Callable[[Path], None]:
    return lambda path: torch.save(state, path, **options)


OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "is damaged: its end is missing"),
        (flip, "is damaged .*/data/0 is not as it was written"),
        (folder, "is a folder"),
        (archive, "is a zip archive, but none that torch.save wrote"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("model: {}\n"), "a text file that begins with b'model"),
        (lambda path: path.write_bytes(b"\x00\x01"), "no archive that begins with"),
        (lambda path: path.write_bytes(b"\x80\x02junk"), "cannot be read as tensors and plain data"),
        (other({"m": torch.nn.Linear(1, 1)}), r"holds Python objects \(torch.nn.modules.linear.Linear\)"),
        (other({"m": torch.nn.Linear(1, 1)}, **OLD), r"holds Python objects \(torch.nn.modules.linear.Linear\)"),
        (other(SimpleNamespace(a=1)), r"holds Python objects \(types.SimpleNamespace\)"),
        (other({"state_dict": {}, "epoch": 3}), "it holds a mapping with the keys 'state_dict', 'epoch'"),
        (other({"a": torch.ones(1)}, **OLD), "it holds a state_dict of 1 tensors with the keys 'a'"),
        (other(torch.nn.Conv2d(1, 1, 1).state_dict()), "a state_dict of 2 tensors with the keys 'weight', 'bias'"),
        (other([1]), "it holds a list"),
        (other({}), "it holds an empty mapping"),
        (other({**STATE, "format": 4}), "is a checkpoint of format 4; this version reads 1, 2 and 3"),
        (other({"format": 2, "model": {}}), "it lacks class_names, metadata, config, step, steps, history"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, STATE)
    spoil(path)
    with pytest.raises(ValueError, match=rf"c.pt: .*{message}") as error:
        load_checkpoint(path)
    text = str(error.value)
    assert "\n" not in text
    assert "weights_only" not in text
    assert "expected a checkpoint that" in text or "this version reads" in text
    if path.is_dir():
        shutil.rmtree(path)
