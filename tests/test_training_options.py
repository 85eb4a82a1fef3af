"""What the options of a training run do, each against its meaning."""

import functools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_backbone import ToyBackbone
from toy_data import write_toy_data
from toy_training import CONFIG, Items, assert_equal_states, give_scores, train

from pspnet_fast.models import PSPNet, resnet
from pspnet_fast.models.recompute import recomputed
from pspnet_fast.training import Callback, ConfigError, TrainConfig, TrainResult, evaluate, fit
from pspnet_fast.training.checkpoint import load_checkpoint
from pspnet_fast.training.distributed import World
from pspnet_fast.training.protocol import describe
from pspnet_fast.training.report import read_log
from pspnet_fast.training.step import Step
from pspnet_fast.training.times import Times

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data"))


def test_averaged_weights_are_validated_and_saved(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated = []

    def scored(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        validated.append(model)
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr("pspnet_fast.training.run.evaluate", scored)
    model, result = train(root, tmp_path, replace(CONFIG, epochs=1, ema=0.5))
    assert validated[0] is not model
    assert result.best is not None
    best, last = load_checkpoint(result.best), load_checkpoint(result.checkpoint)
    assert_equal_states(best["model"], last["average"])
    assert_equal_states(last["model"], model.state_dict())
    assert not torch.equal(best["model"]["cls.4.weight"], last["model"]["cls.4.weight"])


def test_iterations_validations_and_checkpoints(root: Path, tmp_path: Path) -> None:
    told: list[Any] = []

    class Told(Callback):
        def on_step(self, step: int, values: Any) -> None:
            told.append((step, *values))

        def on_validation(self, record: Any) -> None:
            told.append(("validation", record["step"], record["epoch"]))

        def on_end(self, result: TrainResult) -> None:
            told.append(("end", len(result.history)))

    config = replace(CONFIG, iterations=7, val_every=3, checkpoint_every=2, keep=9, log_every=2)
    _, result = train(root, tmp_path, config, callbacks=[Told()])
    assert [record["step"] for record in result.history] == [3, 6, 7]
    steps = [(number, "loss", "lr") for number in range(1, 8)]
    validations = [("validation", 3, 0.75), ("validation", 6, 1.5), ("validation", 7, 1.75)]
    assert told == [*steps[:3], validations[0], *steps[3:6], validations[1], steps[6], validations[2], ("end", 3)]
    kept = sorted(int(path.stem.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*.pt"))
    assert kept == [2, 3, 4, 6]
    assert set(result.history[0]["times"]) == {"data", "forward", "backward", "optimizer"}
    protocol = read_log(tmp_path / "log.jsonl")[0]["protocol"]
    assert "7 iterations, 1.75 epochs of 4; validation every 3 iterations" in protocol


def test_patience_ends_the_training(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_scores(monkeypatch, 0.1, 0.3, 0.2, 0.3, 0.9)
    config = replace(CONFIG, epochs=9, patience=2)
    _, result = train(root, tmp_path, config)
    assert [record["miou"] for record in result.history] == [0.1, 0.3, 0.2, 0.3]
    _, again = train(root, tmp_path, config, resume=True)
    assert len(again.history) == 4


@pytest.mark.parametrize("options", [{"fp16": True}, {"compile": True}, {"recompute": True}, {"deterministic": True}])
def test_options_train(root: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    if "compile" in options:  # its own compiler takes a minute for this; what is asked here is that it is asked
        compiled = torch.compile
        monkeypatch.setattr(torch, "compile", lambda net: asked.append(net) or compiled(net, backend="eager"))
    plain, _ = train(root, tmp_path / "plain", replace(CONFIG, epochs=1))
    modes: list[bool] = []

    class Mode(Callback):
        def on_step(self, step: int, values: Any) -> None:
            modes.append(torch.are_deterministic_algorithms_enabled())

    model, result = train(root, tmp_path / "option", replace(CONFIG, epochs=1, **options), callbacks=[Mode()])
    assert modes == ["deterministic" in options] * 4
    assert not torch.are_deterministic_algorithms_enabled()
    losses = [read_log(tmp_path / name / "log.jsonl")[1]["loss"] for name in ("plain", "option")]
    if "fp16" in options:  # the scaler may leave out the first steps
        assert losses[0] != losses[1] == pytest.approx(losses[0], rel=2e-3)
        assert load_checkpoint(result.checkpoint)["scaler"]["scale"] > 1
    elif "compile" in options:  # a compiled graph takes the fused head for maps of any size
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert asked
    else:
        assert losses[0] == losses[1]
        assert_equal_states(model.state_dict(), plain.state_dict())


def count(saved: list[int], tensor: Tensor) -> Tensor:
    saved.append(tensor.nbytes)
    return tensor


def test_recomputed_activations_leave_all_as_it_is() -> None:
    states, gradients, kept = [], [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = PSPNet(3, resnet("resnet18"), bins=(1, 2), dropout=0.0).train()
        model.recompute = again
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(count, saved), lambda tensor: tensor):
            model(torch.ones(2, 3, 33, 33).cumsum(3))["out"].square().sum().backward()
        states.append(model.state_dict())
        gradients.append([parameter.grad for name, parameter in model.named_parameters() if "aux" not in name])
        kept.append(sum(saved))
    assert kept[1] < 0.5 * kept[0]
    assert_equal_states(*states)
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    layer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    recomputed(layer, torch.randn(2, 3, 4, 4)).sum().backward()
    assert layer[1].num_batches_tracked == 1
    with pytest.raises(ValueError, match=r"train.recompute needs a PSPNet"):
        Step(nn.Conv2d(1, 1, 1), replace(CONFIG, recompute=True), CPU, World())


def test_weights_that_are_no_longer_finite(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the loss before them was: nothing of them is saved."""
    call = Step.__call__

    def poisoned(self: Step, *arguments: Any) -> Tensor:
        values = call(self, *arguments)
        if self.optimizer.param_groups[0]["lr"] < 0.9 * CONFIG.lr:
            self.model.cls[4].bias.data[0] = torch.inf  # type: ignore[index,operator,union-attr]
        return values

    monkeypatch.setattr(Step, "__call__", poisoned)
    with pytest.raises(FloatingPointError, match=r"weights are no longer finite after iteration 3 .*iteration 0\."):
        train(root, tmp_path, CONFIG)
    assert load_checkpoint(tmp_path / "finite.pt")["step"] == 0
    assert not (tmp_path / "checkpoint.pt").exists()


def test_loading_that_training_waits_for_is_said_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Times, "read", lambda _: {"data": 40.0, "forward": 30.0, "backward": 20.0, "optimizer": 10.0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(root, tmp_path, replace(CONFIG, epochs=2, log_every=1))
    said = [str(warning.message) for warning in caught if "loading is the bottleneck" in str(warning.message)]
    assert len(said) == 1
    assert "waits for images 40% of the time; more train.workers (now 0)" in said[0]


def test_times_belong_to_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 10.0, 12.0, 15.0, 16.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    times = Times(CPU)
    times.start()
    for part in ("data", "forward", "data", "optimizer"):
        times.mark(part)
    assert times.read() == {"data": 3.0, "forward": 3.0, "backward": 0.0, "optimizer": 4.0}
    assert set(times.read().values()) == {0.0}


def test_dropout_is_that_of_the_iteration(tmp_path: Path) -> None:
    """Whatever drew random numbers before it."""
    outcomes = []
    for draws in (0, 5):

        class Drawing(Callback):
            def on_step(self, step: int, values: Any, draws: int = draws) -> None:
                torch.rand(draws)

        torch.manual_seed(0)
        model = PSPNet(3, ToyBackbone(), bins=(1, 2), dropout=0.5)
        config = replace(CONFIG, epochs=2, log_every=1)
        fit(model, Items(4), Items(2), config, tmp_path / str(draws), class_names="abc", callbacks=[Drawing()])
        outcomes.append(model.state_dict())
    assert_equal_states(*outcomes)


def test_protocol_in_words() -> None:
    config = TrainConfig(
        epochs=2,
        batch_size=16,
        accumulate=2,
        optimizer="adamw",
        head=["aux"],
        warmup=5,
        min_lr=1e-4,
        ohem=True,
        clip_norm=1.0,
        ema=0.99,
        fp16=True,
        frozen_norms=True,
        patience=3,
    )
    text = "\n".join(describe(config, 10, World(0, 4)))
    for part in (
        "AdamW, betas 0.9 and 0.999, weight decay 0.0001 on all parameters; learning rate 0.01",
        "10 times that for aux; gradients clipped to norm 1",
        "poly schedule of power 0.9 to 0.0001 after the last iteration of 20, after a linear rise over 5 iterations",
        "20 iterations, 2 epochs of 10; validation every 1 epochs; stops after 3 validations",
        "16 images: 4 processes of 2 parts of 2 images each; batch norms see 8 images, those of 4 processes; ",
        "pixels below probability 0.7",
        "autocast to float16 with a gradient scaler; seed 0; weights averaged with decay 0.99 are validated",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 3}, "train.accumulate must be a divisor of batch_size, got 3"),
        ({"min_lr": 0.1}, "train.min_lr must be at most train.lr = 0.01, got 0.1"),
        ({"fp16": True, "bf16": True}, "train.fp16 must be false where train.bf16 is true"),
        ({"average_ignored": True, "ohem": True}, "train.average_ignored must be false with ohem"),
        ({"head": ["neck"]}, "train.head must be some of ppm, cls, aux, got"),
        ({"ema": 1.0}, "train.ema must be above 0 and below 1"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
