"""Runs that are stopped, by a signal, an error or SIGKILL, and go on to the same bits."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import RUNS, assert_same_runs, kill_and_resume
from torch import Tensor
from toy_data import write_toy_data
from toy_training import CONFIG, Items, assert_equal_states, train

from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.training import Interrupted, ResumeError, evaluate
from pspnet_fast.training.checkpoint import load_checkpoint
from pspnet_fast.training.loading import train_loader
from pspnet_fast.training.report import read_log

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data"))


def at(epoch: int, index: int, action: Any) -> type[ListDataset]:
    """A training set that does something when an item is read."""

    class Acting(ListDataset):
        def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
            if (self.epoch, item) == (epoch, index):
                action()
            return super().__getitem__(item)

    return Acting


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs that nothing interrupts."""
    out = tmp_path_factory.mktemp("straight")
    train(root, out)
    return out


def test_resumed_run_equals_an_uninterrupted_one(root: Path, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(root, tmp_path, dataset=at(2, 5, interrupt))
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8
    torch.rand(17)  # whatever happened to the generator in between
    train(root, tmp_path, replace(CONFIG, workers=1, log_every=1), resume=True)
    assert_same_runs(straight, tmp_path)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_within_an_epoch_saves_the_iteration(
    root: Path, straight: Path, tmp_path: Path, epoch: int, number: int
) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"signal {number} is ignored here, as nohup has it, and so it stays")
    with pytest.raises(Interrupted) as error:
        train(root, tmp_path, dataset=at(epoch, 5, lambda: os.kill(os.getpid(), number)))
    assert error.value.signal == number
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert len(state["history"]) == epoch
    assert 4 * epoch <= state["step"] < 4 * epoch + 4
    assert len(state["losses"]) == state["step"] - 4 * epoch
    torch.rand(17)
    train(root, tmp_path, resume=True)
    assert_same_runs(straight, tmp_path)


def test_signal_after_every_iteration(root: Path, straight: Path, tmp_path: Path) -> None:
    class Always(ListDataset):
        count = 0

        def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
            Always.count += 1
            if Always.count % 4 == 0:  # the second batch of each call
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(item)

    steps, resume = [], False
    while not steps or steps[-1] < 16:
        try:
            Always.count = 0
            train(root, tmp_path, dataset=Always, resume=resume)
        except Interrupted:
            resume = True
        steps.append(load_checkpoint(tmp_path / "checkpoint.pt")["step"])
    assert len(set(steps)) >= 8
    train(root, tmp_path, resume=True)
    assert_same_runs(straight, tmp_path)


def test_signal_in_validation(root: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pspnet_fast.training.run.evaluate", scores)
        with pytest.raises(Interrupted):
            train(root, tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (state["step"], state["history"]) == (4, [])
    train(root, tmp_path, resume=True)
    assert_same_runs(straight, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_loader_leaves_out_what_is_done(workers: int, done: int) -> None:
    items = Items(11)
    whole, rest = (
        [images[:, 0, 0, 0].tolist() for images, _ in train_loader(items, 3, workers, 1, range(6 + skipped, 9))]
        for skipped in (0, done)
    )
    assert len(whole) == 3
    assert rest == whole[done:]


def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(root: Path, straight: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, keep=3)
    with pytest.raises(KeyboardInterrupt):
        train(root, tmp_path, config, dataset=at(3, 5, interrupt))
    path, names = tmp_path / "checkpoint.pt", ["checkpoint-00000004.pt", "checkpoint-00000008.pt"]
    assert sorted(kept.name for kept in tmp_path.glob("checkpoint-*")) == names
    assert [load_checkpoint(kept)["step"] for kept in (tmp_path / names[0], tmp_path / names[1], path)] == [4, 8, 12]
    for damaged in (path, tmp_path / names[1]):
        damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"checkpoint.pt: is damaged: .* checkpoint-00000008.pt is .* with --previous"):
        train(root, tmp_path, config, resume=True)
    train(root, tmp_path, config, resume=True, previous=True)
    with pytest.raises(AssertionError):
        assert_same_runs(straight, tmp_path)  # the two differ in keep
    assert_equal_states(*(load_checkpoint(folder / "checkpoint.pt")["model"] for folder in (straight, tmp_path)))
    assert_equal_states(*(read_log(folder / "log.jsonl")[1:] for folder in (straight, tmp_path)))
    for kept in (path, *tmp_path.glob("checkpoint-*")):
        kept.write_text("")
    with pytest.raises(ValueError, match=r"checkpoint.pt: is empty; .*nor is any of the 2 checkpoints before it whole"):
        train(root, tmp_path, config, resume=True, previous=True)


def test_checkpoint_of_an_older_version(root: Path, straight: Path, tmp_path: Path) -> None:
    """Its configuration lacks the newer keys, which have their defaults; its random state is not used."""
    with pytest.raises(Interrupted):
        train(root, tmp_path, dataset=at(2, 5, lambda: os.kill(os.getpid(), signal.SIGINT)))
    path = tmp_path / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["iterations"]
    for name in ("accumulate", "optimizer", "ema", "val_every", "head", "min_lr", "deterministic", "dice"):
        del state["config"][name]
    torch.save({**state, "format": 2, "rng": {"cpu": torch.get_rng_state()}}, path)
    with pytest.raises(ResumeError, match=r"train.optimizer was 'sgd', now 'adamw'; train.ema was None, now 0.5"):
        train(root, tmp_path, replace(CONFIG, optimizer="adamw", ema=0.5), resume=True)
    train(root, tmp_path, resume=True)
    assert_same_runs(straight, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd has threads then, which forks of this process lack")
@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_killed_run_goes_on_to_the_same_bits(root: Path, tmp_path: Path, name: str) -> None:
    config = replace(RUNS[name], epochs=4)
    train(root, tmp_path / "straight", config)
    kills, _ = kill_and_resume(root, tmp_path / "killed", config, seed=0, kills=3, delay=0.5)
    assert kills > 0
    assert_same_runs(tmp_path / "straight", tmp_path / "killed")
