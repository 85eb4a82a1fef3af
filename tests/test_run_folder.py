"""What the folder of a run holds, what a resumed run may change, and one process in a folder."""

import dataclasses
import math
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_data import NAMES, write_toy_data
from toy_training import CONFIG, assert_equal_states, give_scores, train

from pspnet_fast.training import ResumeError
from pspnet_fast.training.checkpoint import load_checkpoint, save_checkpoint
from pspnet_fast.training.report import read_log
from pspnet_fast.training.run_folder import locked

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data"))


def test_resuming_a_finished_run_changes_nothing(root: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    first, result = train(root, tmp_path, config)
    second, again = train(root, tmp_path, config, resume=True)
    assert again == result
    assert_equal_states(first.state_dict(), second.state_dict())


def test_history_that_begins_with_nan(root: Path, tmp_path: Path) -> None:
    """As older versions wrote it of an epoch without scores."""
    train(root, tmp_path, replace(CONFIG, epochs=1))
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["history"][0]["miou"] = state["best_miou"] = float("nan")
    torch.save(state, path)
    _, result = train(root, tmp_path, replace(CONFIG, epochs=2), resume=True, allow=["train.epochs"])
    assert result.best_miou == result.history[1]["miou"]
    assert load_checkpoint(path)["best_miou"] == load_checkpoint(tmp_path / "best.pt")["best_miou"] == result.best_miou


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("finished")
    train(root, out, replace(CONFIG, epochs=1), metadata={"data": {"crop": [33, 41]}})
    return root, out


SAME = {"metadata": {"data": {"crop": [33, 41]}}}


def test_resume_lists_every_change(finished: tuple[Path, Path]) -> None:
    root, out = finished
    config = replace(CONFIG, epochs=9, lr=0.5, workers=1)
    with pytest.raises(ResumeError, match=r"cannot resume .*checkpoint.pt: ") as error:
        train(root, out, config, resume=True, metadata={"data": {"crop": [33, 43]}})
    assert error.value.changed == ["train.epochs", "train.lr", "data.crop"]
    for part in (
        "train.epochs was 1, now 9",
        "train.lr was 0.02, now 0.5",
        "data.crop was [33, 41], now [33, 43]",
        "the learning rate would fall to 0 over the new number of epochs",
        "only train.device, train.workers, train.log_every, train.val_batch_size, train.checkpoint_every, "
        "train.keep change nothing",
    ):
        assert part in str(error.value)


def test_resume_lists_what_can_never_change(finished: tuple[Path, Path]) -> None:
    root, out = finished
    config = replace(CONFIG, epochs=1, batch_size=3)
    message = "train.batch_size was 2, now 3.*iterations per epoch was 4, now 2; .* cannot change within a run"
    with pytest.raises(ResumeError, match=message) as error:
        train(root, out, config, resume=True, **SAME)
    assert error.value.changed == []
    for name in ("iterations per epoch", "train.workers", "train.leraning_rate"):
        with pytest.raises(ValueError, match=f"{name} cannot be allowed to change"):
            train(root, out, replace(CONFIG, epochs=1), resume=True, allow=[name], **SAME)


def test_resume_with_more_epochs_goes_on_in_the_new_schedule(finished: tuple[Path, Path], tmp_path: Path) -> None:
    root, out = finished
    for path in out.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    before = load_checkpoint(tmp_path / "checkpoint.pt")
    config = replace(CONFIG, epochs=3, lr=0.01, weight_decay=0.5)
    allow = ["train.epochs", "train.lr", "train.weight_decay"]
    _, result = train(root, tmp_path, config, resume=True, allow=allow, **SAME)
    assert [record["epoch"] for record in result.history] == [1, 2, 3]
    assert result.history[0] == before["history"][0]
    rates = [record["lr"] for record in read_log(tmp_path / "log.jsonl") if record["event"] == "iteration"]
    assert rates[:4] == pytest.approx([0.02 * (1 - step / 4) ** 0.9 for step in range(4)])
    assert rates[4:] == pytest.approx([0.01 * (1 - step / 12) ** 0.9 for step in range(4, 12)])
    after = load_checkpoint(tmp_path / "checkpoint.pt")
    assert {group["weight_decay"] for group in after["optimizer"]["param_groups"]} == {0.5}
    assert after["config"]["epochs"] == 3
    with pytest.raises(ResumeError, match=r"12 iterations are done, more than the 4 of train.epochs = 1"):
        train(root, tmp_path, replace(config, epochs=1), resume=True, allow=["train.epochs"], **SAME)


def test_weights_of_another_model(finished: tuple[Path, Path], tmp_path: Path) -> None:
    root, out = finished
    state = load_checkpoint(out / "checkpoint.pt")
    state["model"]["cls.4.bias"] = torch.zeros(7)
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ResumeError, match=r"its weights are of another model .*cls.4.bias"):
        train(root, tmp_path, replace(CONFIG, epochs=1), resume=True, **SAME)


def test_weights_alone_are_no_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    root, out = finished
    (tmp_path / "checkpoint.pt").write_bytes((out / "best.pt").read_bytes())
    with pytest.raises(ResumeError, match=r"it holds weights alone, as best.pt does, no optimizer's state"):
        train(root, tmp_path, replace(CONFIG, epochs=1), resume=True, **SAME)


def test_nothing_to_resume(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*checkpoint.pt"):
        train(root, tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()


def test_the_best_epoch_is_kept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_scores(monkeypatch, 0.25, 0.75, 0.75, math.nan, 0.5)
    (tmp_path / "best.pt").write_text("of an earlier run")
    _, result = train(root, tmp_path, replace(CONFIG, epochs=5))
    assert [record["miou"] for record in result.history] == [0.25, 0.75, 0.75, None, 0.5]
    assert (result.best_miou, result.best) == (0.75, tmp_path / "best.pt")
    best, last = load_checkpoint(tmp_path / "best.pt"), load_checkpoint(tmp_path / "checkpoint.pt")
    assert (best["step"], best["best_miou"], last["best_miou"]) == (8, 0.75, 0.75)
    assert last["step"] == 20
    assert "optimizer" not in best
    assert best["model"].keys() == last["model"].keys()


def test_failed_save_keeps_the_epoch_before(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, state: dict[str, Any]) -> None:
        if state["step"] == 12:
            raise OSError(28, "cannot be written: No space left on device", str(path))
        save_checkpoint(path, state)

    with monkeypatch.context() as patch:
        patch.setattr("pspnet_fast.training.state.save_checkpoint", full)
        with pytest.raises(OSError, match="No space left"):
            train(root, tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8
    _, result = train(root, tmp_path, resume=True)
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4]


def test_disk_without_room_is_found_at_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match=r"no space for the checkpoints of the run: 0.1 MB needed, 0.0 MB free"):
            train(root, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("log", ["cut", "gone"])
def test_resume_with_a_damaged_log(finished: tuple[Path, Path], tmp_path: Path, log: str) -> None:
    root, out = finished
    for name in ("checkpoint.pt", "log.jsonl"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    if log == "cut":
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"event": "iter')
    else:
        (tmp_path / "log.jsonl").unlink()
    _, result = train(root, tmp_path, replace(CONFIG, epochs=2), resume=True, allow=["train.epochs"], **SAME)
    assert len(result.history) == 2
    epochs = [record["epoch"] for record in read_log(tmp_path / "log.jsonl") if record["event"] == "epoch"]
    assert epochs == ([1, 2] if log == "cut" else [2])


def hold(folder: Path, held: Any) -> None:
    with locked(folder):
        held.set()
        time.sleep(600)


def test_a_folder_belongs_to_one_process(root: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="another process is training into"):
        train(root, tmp_path)
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match="another process is training into"), locked(tmp_path):
        pass
    process.kill()
    process.join()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_several_processes_without_a_launcher(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE = 2 .*RANK and LOCAL_RANK .*start them with torchrun"):
        train(root, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    _, result = train(root, tmp_path / "run", replace(CONFIG, epochs=1))
    assert len(result.history) == 1


def test_settings_are_those_of_the_configuration(finished: tuple[Path, Path]) -> None:
    """The keys of a message are those that a user writes."""
    state = load_checkpoint(finished[1] / "checkpoint.pt")
    assert state["config"].keys() == {field.name for field in dataclasses.fields(CONFIG)}
    assert state["class_names"] == NAMES
