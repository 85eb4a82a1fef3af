"""Training, resuming and evaluation of a toy network."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_backbone import ToyBackbone
from toy_data import COLORS, NAMES, SIZE, write_toy_data
from toy_training import CONFIG, Items, assert_equal_states, train

from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from pspnet_fast.inference.predict import Predictor, predict_labels
from pspnet_fast.inference.render import colorize
from pspnet_fast.models import PSPNet
from pspnet_fast.training import ConfigError, Metrics, evaluate, fit
from pspnet_fast.training.checkpoint import load_checkpoint
from pspnet_fast.training.evaluation import choose_device
from pspnet_fast.training.loading import val_loader
from pspnet_fast.training.report import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data"))


def test_fit_learns_and_leaves_its_files(root: Path, tmp_path: Path) -> None:
    (root / "often.txt").write_text(6 * (root / "train.txt").read_text())
    config = replace(CONFIG, epochs=3, batch_size=4, lr=0.05, seed=4)  # of the first 8, two end at 0.4 and 0.5
    model, result = train(root, tmp_path, config, train_list="often.txt", metadata={"note": "kept"})
    assert result.history[-1]["loss"] < 0.75 * result.history[0]["loss"]
    assert result.best_miou is not None
    assert result.best_miou > 0.6
    assert result.best_miou == max(record["miou"] for record in result.history)

    checkpoint = load_checkpoint(result.checkpoint)
    assert_equal_states(checkpoint["model"], model.state_dict())
    assert checkpoint["metadata"] == {"note": "kept", "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
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
    assert records[0]["versions"]["torch"] == torch.__version__

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


def test_tensorboard_pictures(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("pspnet_fast.training.pictures.WIDEST", SIZE[1])
    model, _ = train(root, tmp_path, replace(CONFIG, epochs=2), metadata={"colors": COLORS})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["val/image 1", "val/image 2", "val/image 3"]
    items = ListDataset(root, root / "val.txt", len(NAMES), EvalTransform())
    for index, tag in enumerate(events.Tags()["images"]):
        first, last = events.Images(tag)
        assert (first.step, last.step) == (4, 8)
        picture = cv2.imdecode(np.frombuffer(last.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        image, truth, prediction = np.split(picture, 3, axis=1)
        read, label = items.read(index)
        assert np.abs(image - read).max() <= 1
        assert (truth == colorize(label, COLORS)).all()
        with torch.no_grad():
            expected = predict_labels(model.eval(), items[index][0][None])[0].numpy()
        assert (prediction == colorize(expected, COLORS)).all()


def test_same_seed_same_weights_and_other_seed_others(root: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    first, again, other = (
        train(root, tmp_path / str(index), replace(config, seed=seed))[0] for index, seed in enumerate((1, 1, 2))
    )
    assert_equal_states(first.state_dict(), again.state_dict())
    assert not torch.equal(first.state_dict()["cls.4.weight"], other.state_dict()["cls.4.weight"])


def test_too_few_images_for_a_batch(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one batch \(train.batch_size = 9\) and the validation set one"):
        train(root, tmp_path, replace(CONFIG, batch_size=9))


def test_diverged_loss_stops(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"the loss is (nan|inf) at iteration \d of 16, of the images "
    ) as error:
        train(root, tmp_path, replace(CONFIG, lr=1e30))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] is None
    assert "finite.pt holds the weights of iteration 0." in str(error.value)
    assert len(re.findall(r"train_\d.png", str(error.value))) == 2
    finite = load_checkpoint(tmp_path / "finite.pt")
    torch.manual_seed(CONFIG.seed)
    assert_equal_states(finite["model"], PSPNet(len(NAMES), ToyBackbone(), bins=(1, 2)).state_dict())


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("option", ["bf16", "channels_last"])
def test_options_keep_learning(root: Path, tmp_path: Path, option: str) -> None:
    model, result = train(root, tmp_path, replace(CONFIG, epochs=3, **{option: True}))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if option == "channels_last":
        assert model.cls[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("split", ["train", "val", "both"])
def test_split_without_labels_is_said_once(tmp_path: Path, split: str) -> None:
    train_set, val_set = (Items(4, 255 if split in (name, "both") else 0) for name in ("train", "val"))
    val_set.source = tmp_path / "val.txt"  # type: ignore[attr-defined]
    model = PSPNet(2, ToyBackbone(), bins=(1, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(model, train_set, val_set, replace(CONFIG, epochs=3, log_every=1), tmp_path, class_names="ab")
    said = [str(warning.message) for warning in caught if "no pixel has a label" in str(warning.message)]
    assert len(said) == (2 if split == "both" else 1)
    names = {"train": "train_set: ", "val": f"{tmp_path / 'val.txt'}: "}
    for name, begin in names.items():
        assert any(text.startswith(begin) for text in said) is (split in (name, "both"))
    if split != "val":
        assert all(record["loss"] == 0 for record in result.history)
    scored = split == "train"
    assert (result.best_miou is not None) is scored
    assert (result.best is not None) is scored
    assert (tmp_path / "best.pt").exists() is scored
    assert (result.history[0]["miou"] is not None) is scored
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (checkpoint["best_miou"] is not None) is scored
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_numbers_of_classes(root: Path, tmp_path: Path) -> None:
    message = "train.class_weights must be one number a class, 3 in all, got 2"
    with pytest.raises(ConfigError, match=message):
        train(root, tmp_path / "run", replace(CONFIG, class_weights=[1.0, 2.0]))
    model = PSPNet(256, ToyBackbone(), bins=(1, 2))
    with pytest.raises(ValueError, match="class_names must be 1 to 255 names, got 256"):
        fit(model, Items(4), Items(4), CONFIG, tmp_path / "run", class_names=[str(index) for index in range(256)])
    with pytest.raises(ValueError, match="class_names must differ, but 'a' is given more than once"):
        fit(PSPNet(3, ToyBackbone(), bins=(1, 2)), Items(4), Items(4), CONFIG, tmp_path / "run", class_names="aba")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_curves")
def test_checkpoint_describes_its_model(root: Path, tmp_path: Path) -> None:
    arguments = {"backbone": "resnet18", "stem": "conv7", "output_stride": 16, "bins": (1, 2), "head_channels": 8}
    model = PSPNet(len(NAMES), **arguments)
    train(root, tmp_path, replace(CONFIG, epochs=1), model=model)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match="names no colors: generated ones are used"):
        predictor = Predictor.from_checkpoint(checkpoint, torch.device("cpu"))
    assert (predictor.mean, predictor.std) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    image = torch.randn(3, 40, 48)
    expected = predict_labels(model.eval(), image[None])[0]
    assert torch.equal(predictor(image), expected)
    assert len(set(predictor.colors)) == len(NAMES)


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
