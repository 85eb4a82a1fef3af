"""Learning rates, schedule and loss."""

import pytest
import torch
import torch.nn.functional as F
from toy_data import ToyBackbone

from pspnet_fast.models import PSPNet
from pspnet_fast.training.config import TrainConfig
from pspnet_fast.training.optimizer import cross_entropy, make_optimizer, pspnet_loss, set_poly_lr


def test_head_learns_ten_times_faster() -> None:
    model = PSPNet(3, ToyBackbone())
    optimizer = make_optimizer(model, TrainConfig(lr=0.01, momentum=0.8, weight_decay=0.002))
    set_poly_lr(optimizer, 0, 100, 0.9)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        head = name.startswith(("ppm.", "cls.", "aux."))
        assert rates[id(parameter)] == pytest.approx(0.1 if head else 0.01)
    assert all((group["momentum"], group["weight_decay"]) == (0.8, 0.002) for group in optimizer.param_groups)


def test_model_without_the_head_names_has_one_rate() -> None:
    optimizer = make_optimizer(torch.nn.Linear(2, 2), TrainConfig(lr=0.5))
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5]


def test_poly_schedule() -> None:
    optimizer = make_optimizer(PSPNet(3, ToyBackbone()), TrainConfig(lr=0.02))
    assert set_poly_lr(optimizer, 0, 40, 0.9) == 0.02
    assert set_poly_lr(optimizer, 10, 40, 0.9) == pytest.approx(0.02 * 0.75**0.9)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.2 * 0.75**0.9)
    assert set_poly_lr(optimizer, 39, 40, 0.9) == pytest.approx(0.02 * 0.025**0.9)


def test_cross_entropy_averages_over_labelled_pixels() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    label[:, 1:] = 255
    expected = F.cross_entropy(logits[:, :, 0], label[:, 0])
    torch.testing.assert_close(cross_entropy(logits, label, True), expected)


@pytest.mark.parametrize("align_corners", [True, False])
def test_logits_are_upsampled_to_the_label(align_corners: bool) -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(1, 3, 2, 3), torch.randint(0, 3, (1, 7, 9))
    upsampled = F.interpolate(logits, (7, 9), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(cross_entropy(logits, label, align_corners), F.cross_entropy(upsampled, label))


def test_all_ignored_gives_zero_loss_and_gradient() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 8, 8), 255), True)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_auxiliary_loss_is_weighted() -> None:
    torch.manual_seed(0)
    outputs = {"out": torch.randn(1, 3, 4, 4), "aux": torch.randn(1, 3, 4, 4)}
    label = torch.randint(0, 3, (1, 4, 4))
    main, aux = (F.cross_entropy(outputs[name], label) for name in ("out", "aux"))
    torch.testing.assert_close(pspnet_loss(outputs, label, 0.4, True), main + 0.4 * aux)
    torch.testing.assert_close(pspnet_loss({"out": outputs["out"]}, label, 0.4, True), main)


def test_bfloat16_logits_give_a_float32_loss() -> None:
    loss = cross_entropy(torch.randn(1, 3, 2, 2).bfloat16(), torch.zeros(1, 4, 4, dtype=torch.int64), True)
    assert loss.dtype == torch.float32
