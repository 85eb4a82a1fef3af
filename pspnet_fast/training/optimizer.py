"""SGD with a faster head, the poly schedule, and the loss of a PSPNet."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.losses import UpsampleCrossEntropyLoss
from pspnet_fast.training.config import TrainConfig

HEAD = ("ppm", "cls", "aux")


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with momentum over two groups: backbone, and head (children ppm, cls, aux) at ``head_lr_factor`` times."""
    head: list[nn.Parameter] = []
    backbone: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (head if name.partition(".")[0] in HEAD else backbone).append(parameter)
    groups = [
        {"params": backbone, "initial_lr": config.lr},
        {"params": head, "initial_lr": config.lr * config.head_lr_factor},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def set_poly_lr(optimizer: torch.optim.Optimizer, step: int, steps: int, power: float) -> float:
    """Set lr = initial_lr * (1 - step / steps) ** power in every group, ``step`` counted from 0; return the first."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 - step / steps) ** power
    return optimizer.param_groups[0]["lr"]


def make_loss(config: TrainConfig, align_corners: bool) -> UpsampleCrossEntropyLoss:
    """Cross entropy over the pixels whose label is not 255, at the label's size, as ``config`` asks for it."""
    return UpsampleCrossEntropyLoss(
        align_corners=align_corners,
        weight=None if config.class_weights is None else torch.tensor(config.class_weights),
        ignore_index=IGNORE_INDEX,
        label_smoothing=config.label_smoothing,
        ohem=config.ohem,
        threshold=config.ohem_threshold,
        min_kept=config.ohem_min_kept,
    )


def pspnet_loss(loss: nn.Module, outputs: Mapping[str, Tensor], label: Tensor, aux_weight: float) -> Tensor:
    """``loss`` of "out" plus ``aux_weight`` times that of "aux" where there is one."""
    total = loss(outputs["out"], label)
    if "aux" in outputs:
        total = total + aux_weight * loss(outputs["aux"], label)
    return total
