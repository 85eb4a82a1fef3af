"""Training, resuming and evaluation of a toy network."""

import json
import math
from collections.abc import Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from toy_data import NAMES, ToyBackbone, write_toy_data

from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import EvalTransform, TrainTransform
from pspnet_fast.models import PSPNet
from pspnet_fast.training import Metrics, TrainConfig, TrainResult, evaluate, fit
from pspnet_fast.training.checkpoint import load_checkpoint
from pspnet_fast.training.loading import val_loader
from pspnet_fast.training.loop import choose_device
from pspnet_fast.training.report import read_log

CONFIG = TrainConfig(epochs=4, batch_size=2, workers=0, device="cpu", log_every=3, lr=0.02, head_lr_factor=2.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data"))


class InterruptedDataset(ListDataset):
    """Ctrl+C in the middle of the third epoch."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.epoch == 2 and index == 5:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def train(
    root: Path,
    out: Path,
    config: TrainConfig = CONFIG,
    dataset: type[ListDataset] = ListDataset,
    train_list: str = "train.txt",
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, TrainResult]:
    torch.manual_seed(config.seed)
    model = model or PSPNet(len(NAMES), ToyBackbone(), bins=(1, 2))
    train_set = dataset(root, root / train_list, len(NAMES), TrainTransform((33, 41), scale=(0.8, 1.2)), config.seed)
    val_set = ListDataset(root, root / "val.txt", len(NAMES), EvalTransform())
    return model, fit(model, train_set, val_set, config, out, class_names=NAMES, **options)


def assert_equal_states(first: Any, second: Any) -> None:
    """Same nested plain data, tensors bit for bit; wall-clock entries aside."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds", "images_per_second"}:
            assert_equal_states(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal_states(one, other)
    else:
        assert first == second or (first != first and second != second)


def test_fit_learns_and_leaves_its_files(root: Path, tmp_path: Path) -> None:
    (root / "often.txt").write_text(6 * (root / "train.txt").read_text())
    config = replace(CONFIG, epochs=3, batch_size=4, lr=0.05)
    model, result = train(root, tmp_path, config, train_list="often.txt", metadata={"note": "kept"})
    assert result.history[-1]["loss"] < 0.75 * result.history[0]["loss"]
    assert result.best_miou > 0.6
    assert result.best_miou == max(record["miou"] for record in result.history)

    checkpoint = load_checkpoint(result.checkpoint)
    assert_equal_states(checkpoint["model"], model.state_dict())
    assert checkpoint["metadata"] == {"note": "kept"}
    assert checkpoint["class_names"] == NAMES
    assert checkpoint["step"] == checkpoint["steps"] == 36
    assert checkpoint["best_miou"] == result.best_miou
    assert checkpoint["config"]["lr"] == config.lr

    records = read_log(tmp_path / "log.jsonl")
    assert [record["event"] for record in records].count("epoch") == 3
    iterations = [record for record in records if record["event"] == "iteration"]
    assert [record["step"] for record in iterations] == list(range(1, 37))
    assert iterations[18]["lr"] == pytest.approx(config.lr * 0.5**0.9)
    first_epoch = [record["loss"] for record in iterations[:12]]
    assert sum(first_epoch) / 12 == pytest.approx(result.history[0]["loss"])
    assert records[0]["config"]["batch_size"] == 4

    curves = cv2.imread(str(tmp_path / "curves.png"))
    assert min(curves.shape[:2]) > 500
    assert curves.std() > 10
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_scalars(root: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = train(root, tmp_path, replace(CONFIG, epochs=2))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 8
    scores = [scalar.value for scalar in events.Scalars("val/miou")]
    assert scores == pytest.approx([record["miou"] for record in result.history])
    assert f"val_iou/{NAMES[0]}" in events.Tags()["scalars"]


def test_resumed_run_equals_an_uninterrupted_one(root: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(root, straight)
    with pytest.raises(KeyboardInterrupt):
        train(root, broken, dataset=InterruptedDataset)
    assert load_checkpoint(broken / "checkpoint.pt")["step"] == 8
    torch.rand(17)  # whatever happened to the generator in between
    train(root, broken, replace(CONFIG, workers=1, log_every=1), resume=True)

    first, second = (load_checkpoint(path / "checkpoint.pt") for path in (straight, broken))
    for state in (first, second):
        del state["config"]["workers"], state["config"]["log_every"]
    assert_equal_states(first, second)
    first_log, second_log = (read_log(path / "log.jsonl")[1:] for path in (straight, broken))
    assert_equal_states(first_log, second_log)


def test_same_seed_same_weights_and_other_seed_others(root: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    first, again, other = (
        train(root, tmp_path / str(index), replace(config, seed=seed))[0] for index, seed in enumerate((1, 1, 2))
    )
    assert_equal_states(first.state_dict(), again.state_dict())
    assert not torch.equal(first.state_dict()["cls.4.weight"], other.state_dict()["cls.4.weight"])


def test_resuming_a_finished_run_changes_nothing(root: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    first, result = train(root, tmp_path, config)
    second, again = train(root, tmp_path, config, resume=True)
    assert again == result
    assert_equal_states(first.state_dict(), second.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 9}, "train.epochs is 1, now 9"),
        ({"lr": 0.5}, "train.lr is 0.02, now 0.5"),
        ({"batch_size": 3}, "train.batch_size is 2, now 3"),
    ],
)
def test_resume_refuses_another_configuration(
    finished: tuple[Path, Path], change: dict[str, Any], message: str
) -> None:
    root, out = finished
    with pytest.raises(ValueError, match=rf"cannot resume .*checkpoint.pt: its {message}"):
        train(root, out, replace(CONFIG, **{"epochs": 1, **change}), resume=True)


def test_resume_refuses_another_schedule_length(finished: tuple[Path, Path]) -> None:
    root, out = finished
    (root / "fewer.txt").write_text("".join((root / "train.txt").read_text().splitlines(keepends=True)[:6]))
    with pytest.raises(ValueError, match="its number of iterations is 4, now 3"):
        train(root, out, replace(CONFIG, epochs=1), train_list="fewer.txt", resume=True)


def test_resume_refuses_other_metadata(finished: tuple[Path, Path]) -> None:
    root, out = finished
    with pytest.raises(ValueError, match="its model is None, now resnet50"):
        train(root, out, replace(CONFIG, epochs=1), metadata={"model": "resnet50"}, resume=True)


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("finished")
    train(root, out, replace(CONFIG, epochs=1))
    return root, out


def test_nothing_to_resume(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*checkpoint.pt"):
        train(root, tmp_path, resume=True)


def test_too_few_images_for_a_batch(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one batch \(batch_size = 9\) and val_set one image, got 8 and 3"):
        train(root, tmp_path, replace(CONFIG, batch_size=9))


def test_diverged_loss_stops(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at iteration \d of 16; try a smaller"):
        train(root, tmp_path, replace(CONFIG, lr=1e30))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] is None


@pytest.mark.parametrize("option", ["bf16", "channels_last"])
def test_options_keep_learning(root: Path, tmp_path: Path, option: str) -> None:
    model, result = train(root, tmp_path, replace(CONFIG, epochs=3, **{option: True}))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if option == "channels_last":
        assert model.cls[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_batch_without_labels_does_no_harm(tmp_path: Path) -> None:
    class Unlabelled(Dataset[tuple[Tensor, Tensor]], Sized):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.full((3, 16, 16), float(index)), torch.full((16, 16), 255)

    model = PSPNet(2, ToyBackbone(), bins=(1, 2))
    config = replace(CONFIG, epochs=1)
    result = fit(model, Unlabelled(), Unlabelled(), config, tmp_path, class_names=["a", "b"])
    assert result.history[0]["loss"] == 0
    assert math.isnan(result.history[0]["miou"])
    assert read_log(tmp_path / "log.jsonl")[-1]["miou"] is None
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_evaluate_compares_at_the_size_of_the_image(root: Path) -> None:
    class Oracle(nn.Module):
        """Recognises the strongest colour of every second pixel."""

        align_corners = False

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"out": nn.functional.avg_pool2d(images, 2)}

    val_set = ListDataset(root, root / "val.txt", len(NAMES), EvalTransform((0, 0, 0), (1, 1, 1)))
    model = Oracle().train()
    metrics = evaluate(model, val_loader(val_set, 2, 0), len(NAMES))
    assert isinstance(metrics, Metrics)
    assert metrics.confusion.sum() == 3 * 38 * 48  # two rows of each image are ignored
    assert metrics.miou > 0.95
    assert model.training


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here: "):
            choose_device(name)
