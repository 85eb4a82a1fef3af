"""What one iteration does: its loss, how parts of a batch make it up, optimiser, averaged weights, frozen norms."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_backbone import ToyBackbone
from toy_training import CONFIG

from pspnet_fast import UpsampleDiceLoss, UpsampleLovaszLoss
from pspnet_fast.models import PSPNet
from pspnet_fast.training import ConfigError, TrainConfig
from pspnet_fast.training.distributed import World
from pspnet_fast.training.loading import Item
from pspnet_fast.training.optimizer import make_optimizer, set_lr
from pspnet_fast.training.protocol import describe
from pspnet_fast.training.step import Step
from pspnet_fast.training.times import Times

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def toy(dropout: float = 0.0, norm: Any = nn.BatchNorm2d) -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(3, ToyBackbone(), bins=(1, 2), dropout=dropout, norm_layer=norm).double()


def batch(count: int = 4, seed: int = 0) -> Item:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count, 17, 17), generator=generator)
    labels[0, :9] = 255
    labels[1] = 255
    return (torch.randn(count, 3, 17, 17, generator=generator), labels)


def split(whole: Item, parts: int) -> list[Item]:
    return [(whole[0][part::parts], whole[1][part::parts]) for part in range(parts)]


def step(model: nn.Module, config: TrainConfig, parts: list[Item], count: int = 1) -> tuple[Step, Tensor]:
    trained = Step(model, config, CPU, World())
    trained.train()
    for _ in range(count):
        values = trained(parts, Times(CPU))
    return trained, values


@pytest.mark.parametrize("options", [{}, {"class_weights": [0.5, 2.0, 1.0]}, {"average_ignored": True}])
def test_parts_are_averaged_over_all_their_labelled_pixels(options: dict[str, Any]) -> None:
    """One part has no label at all: a mean of the parts' means would be half the gradient."""
    config = replace(CONFIG, frozen_norms=True, **options)
    group_norm = lambda channels: nn.GroupNorm(2, channels)  # noqa: E731
    whole, loss = step(toy(norm=group_norm), config, [batch()])
    parts, same = step(toy(norm=group_norm), config, split(batch(), 4))
    torch.testing.assert_close(loss, same, rtol=1e-12, atol=0)
    assert_close_weights(whole.model, parts.model, 1e-12)
    weight = torch.tensor(options.get("class_weights", [1.0] * 3)).double()
    model = toy(norm=group_norm).train()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            assert name.startswith("layer")
    outputs = {
        name: nn.functional.interpolate(value, (17, 17), mode="bilinear", align_corners=True)
        for name, value in model(batch()[0].double()).items()
    }
    means = [nn.functional.cross_entropy(value, batch()[1], weight, ignore_index=255) for value in outputs.values()]
    expected = means[0] + 0.4 * means[1]
    if options.get("average_ignored"):
        expected = expected * (batch()[1] != 255).double().mean()
    assert loss[0].item() == pytest.approx(expected.item(), rel=1e-6)


MEANS = "mean over parts and processes"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"cross_entropy": 0.5, "dice": 2.0, "lovasz": 3.0},
            "0.5 times cross entropy, mean over the labelled pixels of all processes and parts; "
            f"2 times the Dice loss, {MEANS}; 3 times the Lovasz-softmax loss, {MEANS}; plus 0.4 times",
        ),
        ({"cross_entropy": 0.0, "dice": 1.0}, f"1 times the Dice loss, {MEANS}; plus 0.4 times that of the auxiliary"),
    ],
)
def test_losses_of_regions_are_means_over_the_parts(options: dict[str, float], words: str) -> None:
    config = replace(CONFIG, **options)
    parts = split(batch(), 2)
    _, values = step(toy(), config, parts)
    model, expected = toy().train(), torch.zeros(())
    counts = [(labels != 255).sum() for _, labels in parts]
    regions = {"dice": UpsampleDiceLoss(), "lovasz": UpsampleLovaszLoss()}
    for (images, labels), count in zip(parts, counts, strict=True):
        for name, logits in model(images.double()).items():
            upsampled = nn.functional.interpolate(logits, (17, 17), mode="bilinear", align_corners=True)
            entropy = nn.functional.cross_entropy(upsampled, labels, ignore_index=255) * count / sum(counts)
            loss = options["cross_entropy"] * entropy
            for region, function in regions.items():
                loss = loss + options.get(region, 0.0) * function(logits, labels) / 2
            expected = expected + (1.0 if name == "out" else 0.4) * loss
    assert values[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert any(sentence.startswith(words) for sentence in describe(config, 1, World()))
    with pytest.raises(ConfigError, match=r"train.cross_entropy must be above 0 without train.dice or train.lovasz"):
        replace(CONFIG, cross_entropy=0.0)


def test_batch_without_labels_teaches_nothing() -> None:
    model = toy()
    before = {name: value.clone() for name, value in model.named_parameters()}
    nothing = (batch()[0], torch.full((4, 17, 17), 255))
    _, values = step(model, replace(CONFIG, weight_decay=0.0), [nothing])
    assert values.tolist() == [0, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def assert_close_weights(first: nn.Module, second: nn.Module, tolerance: float) -> None:
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_gradients_are_clipped_together() -> None:
    config = replace(CONFIG, momentum=0.0, weight_decay=0.0, lr=1.0, head_lr_factor=1.0, clip_norm=0.01)
    model = toy()
    before = torch.cat([value.detach().flatten().clone() for value in model.parameters()])
    step(model, config, [batch()])
    moved = torch.cat([value.detach().flatten() for value in model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-4)


def test_float16_leaves_out_iterations_whose_gradients_overflow() -> None:
    trained = Step(toy().float(), replace(CONFIG, fp16=True, clip_norm=1.0), CPU, World())
    trained.train()
    before = {name: value.clone() for name, value in trained.model.named_parameters()}
    for scale, overflows in ((2.0**127, True), (2.0**10, False)):
        trained.scaler.load_state_dict({**trained.scaler.state_dict(), "scale": scale})
        values = trained([batch()], Times(CPU))
        assert values.isfinite().all()
        assert trained.scaler.get_scale() == (scale / 2 if overflows else scale)
        for name, value in trained.model.named_parameters():
            assert value.isfinite().all()
            assert torch.equal(value, before[name]) is overflows, name


def test_averaged_weights() -> None:
    model, averages = toy(), None
    trained = Step(model, replace(CONFIG, ema=0.75), CPU, World())
    for number in range(3):
        trained.train()
        trained([batch(seed=number)], Times(CPU))
        now = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
        averages = now if averages is None else {k: 0.75 * v + 0.25 * now[k] for k, v in averages.items()}
    assert averages is not None
    assert trained.validated is not model
    for name, value in averages.items():
        torch.testing.assert_close(trained.validated.state_dict()[name], value, rtol=0, atol=1e-12)


def test_frozen_norms_stay_and_the_heads_learn() -> None:
    model = toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, replace(CONFIG, frozen_norms=True), [batch()], count=2)
    for name, value in model.state_dict().items():
        frozen = name.startswith("layer") and ".1." in name
        assert torch.equal(value, before[name]) is frozen, name


def test_adamw_and_torchvisions_groups() -> None:
    config = TrainConfig(optimizer="adamw", lr=0.01, momentum=0.8, weight_decay=0.3, head=["aux"])
    optimizer = make_optimizer(toy(), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [((0.8, 0.999), 0.3)] * 2
    fast = {id(parameter) for parameter in optimizer.param_groups[1]["params"]}
    assert fast == {id(parameter) for name, parameter in toy_names(optimizer)}


def toy_names(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The group of the fast ones is as large as aux, and ends as it does."""
    aux = toy().aux
    assert aux is not None
    sizes = [tuple(parameter.shape) for parameter in aux.parameters()]
    group = optimizer.param_groups[1]["params"]
    assert [tuple(parameter.shape) for parameter in group] == sizes
    return [("aux", parameter) for parameter in group]


def test_schedules_of_mmsegmentation() -> None:
    """Poly to 1e-4 in the last iteration, after a linear rise."""
    config = TrainConfig(lr=0.01, min_lr=1e-4, reach_min_lr=True, warmup=3)
    optimizer = make_optimizer(toy(), config)
    rates = [set_lr(optimizer, number, 11, config) for number in range(11)]
    poly = [1e-4 + (0.01 - 1e-4) * (1 - number / 10) ** 0.9 for number in range(11)]
    assert rates == pytest.approx([min((n + 1) / 4, 1) * rate for n, rate in enumerate(poly)])
    assert rates[-1] == 1e-4
    assert optimizer.param_groups[1]["lr"] == 1e-4
