"""Learning rates, schedule and loss."""

import pytest
import torch
import torch.nn.functional as F
from toy_backbone import ToyBackbone

from pspnet_fast.models import PSPNet
from pspnet_fast.training import TrainConfig
from pspnet_fast.training.optimizer import make_loss, make_optimizer, pspnet_loss, set_lr


def test_head_learns_ten_times_faster() -> None:
    model = PSPNet(3, ToyBackbone())
    optimizer = make_optimizer(model, TrainConfig(lr=0.01, momentum=0.8, weight_decay=0.002))
    set_lr(optimizer, 0, 100, TrainConfig())
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
    config = TrainConfig(lr=0.02)
    optimizer = make_optimizer(PSPNet(3, ToyBackbone()), config)
    assert set_lr(optimizer, 0, 40, config) == 0.02
    assert set_lr(optimizer, 10, 40, config) == pytest.approx(0.02 * 0.75**0.9)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.2 * 0.75**0.9)
    assert set_lr(optimizer, 39, 40, config) == pytest.approx(0.02 * 0.025**0.9)


def test_loss_is_as_configured() -> None:
    loss = make_loss(TrainConfig(), align_corners=False)
    assert (loss.align_corners, loss.ignore_index, loss.label_smoothing, loss.weight) == (False, 255, 0.0, None)
    assert (loss.reduction, loss.ohem) == ("sum", False)
    config = TrainConfig(label_smoothing=0.1, class_weights=[1.0, 2.0], ohem=True, ohem_threshold=0.9, ohem_min_kept=7)
    loss = make_loss(config, align_corners=True)
    assert (loss.align_corners, loss.label_smoothing) == (True, 0.1)
    assert loss.weight is not None
    assert loss.weight.tolist() == [1.0, 2.0]
    assert (loss.ohem, loss.threshold, loss.min_kept) == (True, 0.9, 7)


def test_auxiliary_loss_is_weighted() -> None:
    outputs = {"out": torch.randn(1, 3, 4, 4), "aux": torch.randn(1, 3, 4, 4)}
    label = torch.randint(0, 3, (1, 4, 4))
    main, aux = (F.cross_entropy(outputs[name], label) for name in ("out", "aux"))
    loss = make_loss(TrainConfig(), align_corners=True)
    torch.testing.assert_close(pspnet_loss(loss, outputs, label, 0.4) / 16, main + 0.4 * aux)
    torch.testing.assert_close(pspnet_loss(loss, {"out": outputs["out"]}, label, 0.4) / 16, main)
