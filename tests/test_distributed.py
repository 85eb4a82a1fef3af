"""Several processes train as one does on the joint batch, and end together."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_backbone import ToyBackbone
from toy_data import NAMES, write_toy_data
from toy_training import CONFIG, Items, train

from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.models import PSPNet
from pspnet_fast.training import ConfigError, Interrupted
from pspnet_fast.training.checkpoint import load_checkpoint
from pspnet_fast.training.distributed import World, leave
from pspnet_fast.training.loading import places_of, train_loader, val_loader
from pspnet_fast.training.report import read_log

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")
STEPS = replace(CONFIG, iterations=5, batch_size=4, val_every=5, class_weights=[1.0, 0.5, 2.0])
# Where batch norms see parts of a batch, two parts are not the whole: here those of the backbone are frozen, and the
# head has other ones.
RUNS = {"whole": {}, "parts": {"frozen_norms": True, "ema": 0.5, "optimizer": "adamw", "lr": 0.001}}


def five_steps(root: Path, out: Path, name: str, parts: int = 1) -> None:
    config = replace(STEPS, **RUNS[name], accumulate=parts)
    torch.manual_seed(config.seed)
    norm = nn.BatchNorm2d if name == "whole" else lambda channels: nn.GroupNorm(2, channels)
    model = PSPNet(len(NAMES), ToyBackbone(), bins=(1, 2), dropout=0, norm_layer=norm).double()
    train(root, out / name, config, model=model)
    assert not any("Sync" in type(module).__name__ for module in model.modules())


def two_processes(function: Callable[..., None], *arguments: object) -> list[int | None]:
    """Exit codes of two processes that torchrun might have started; forked ones, for their start's sake."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_member, args=(rank, port, function, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _member(rank: int, port: int, function: Callable[..., None], *arguments: object) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    function(*arguments)


def both_runs(root: Path, out: Path) -> None:
    five_steps(root, out, "whole")
    five_steps(root, out, "parts", parts=2)
    leave()


def test_two_processes_equal_one_on_the_joint_batch(tmp_path: Path) -> None:
    root = write_toy_data(tmp_path / "data", train=12)
    assert two_processes(both_runs, root, tmp_path / "two") == [0, 0]
    for name in RUNS:
        five_steps(root, tmp_path / "one", name)
        folders = [tmp_path / count / name for count in ("one", "two")]
        one, two = (load_checkpoint(folder / "checkpoint.pt") for folder in folders)
        for key, value in one["model"].items():
            torch.testing.assert_close(two["model"][key], value, rtol=0, atol=1e-9)
        assert one["model"].keys() == two["model"].keys()
        logs = [read_log(folder / "log.jsonl") for folder in folders]
        losses = [[record["loss"] for record in log if "lr" in record] for log in logs]
        assert len(losses[0]) == 5
        assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-9)
        assert one["history"][0]["iou"] == two["history"][0]["iou"]
        parts = 2 if name == "parts" else 1
        batch = f"batches of 4 images: 2 processes of {parts} parts of {2 // parts} images each"
        assert any(batch in sentence for sentence in logs[1][0]["protocol"])


def stopped_run(root: Path, out: Path) -> None:
    class Stopping(ListDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if os.environ["RANK"] == "1" and index == places_of(12, 4, 0, 2)[1][1]:  # of the third iteration
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    with pytest.raises(Interrupted) as error:
        train(root, out, replace(STEPS, log_every=2), dataset=Stopping)
    assert error.value.signal == signal.SIGTERM
    leave()


def test_a_signal_to_one_process_stops_both_after_the_same_iteration(tmp_path: Path) -> None:
    root = write_toy_data(tmp_path / "data", train=12)
    assert two_processes(stopped_run, root, tmp_path / "run") == [0, 0]
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert (checkpoint["step"], checkpoint["history"]) == (3, [])  # looked at where an epoch ends


def killed_run(root: Path, out: Path) -> None:
    class Dying(ListDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if os.environ["RANK"] == "1" and index == places_of(12, 4, 0, 2)[1][1]:  # of the third iteration
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    train(root, out, STEPS, dataset=Dying)


def test_a_process_that_is_killed_ends_the_other_with_an_error(tmp_path: Path) -> None:
    """Also without a launcher that would do it."""
    root = write_toy_data(tmp_path / "data", train=12)
    assert two_processes(killed_run, root, tmp_path / "run") == [1, -signal.SIGKILL]


def test_a_process_that_fails_ends_the_run_with_its_error(tmp_path: Path) -> None:
    """As a user starts it, and within seconds: nothing waits for the process that has gone."""
    root = write_toy_data(tmp_path / "data")
    config = tmp_path / "toy.yaml"
    config.write_text("""
model: {backbone: resnet18, stem: conv7, output_stride: 16, bins: [1, 2], head_channels: 8}
data: {crop: [33, 33], scale: [0.9, 1.1]}
train: {epochs: 2, batch_size: 2, workers: 0, device: cpu}
""")
    epoch = [index for step in range(4) for _, index in places_of(8, 2, 0, step)]
    (root / f"train_{epoch[3]}.png").write_text("no image")  # of the second iteration, in the second process
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "pspnet_fast", "train", str(config), f"data.root={root}", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode != 0
    assert f"Error: {root / f'train_{epoch[3]}.png'}: " in result.stderr


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_shares_of_batches_make_them_whole(size: int, parts: int) -> None:
    items = Items(20)
    shares = [
        [images[:, 0, 0, 0].tolist() for images, _ in train_loader(items, 6, 0, 1, range(2, 5), share=s, parts=parts)]
        for s in ((rank, size) for rank in range(size))
    ]
    for place, step in enumerate(range(2, 5)):
        batch = [index for share in shares for part in share[place * parts : (place + 1) * parts] for index in part]
        assert sorted(batch) == sorted(index for _, index in places_of(20, 6, 1, step))
    validated = [
        index
        for rank in range(size)
        for images, _ in val_loader(items, 3, 0, share=(rank, size))
        for index in images[:, 0, 0, 0].tolist()
    ]
    assert sorted(validated) == list(range(20))


def test_batches_that_cannot_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 3, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert World.from_environment() == World(1, 3, 1)
    root = write_toy_data(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"must be a multiple of 6 = 3 processes \* train.accumulate, got 2"):
        train(root, tmp_path / "run", replace(CONFIG, accumulate=2))
