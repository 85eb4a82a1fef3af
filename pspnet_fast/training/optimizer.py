"""SGD with a faster head, the poly schedule, and the loss of a PSPNet."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast.data import IGNORE_INDEX
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


def cross_entropy(logits: Tensor, label: Tensor, align_corners: bool) -> Tensor:
    """Mean cross entropy over the pixels whose label is not 255, in float32; 0 where all are ignored.

    Args:
        logits: (N, K, h, w), upsampled here to the label's size.
        label: (N, H, W) int64.
    """
    logits = F.interpolate(logits.float(), label.shape[-2:], mode="bilinear", align_corners=align_corners)
    total = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (label != IGNORE_INDEX).sum().clamp(min=1)


def pspnet_loss(outputs: Mapping[str, Tensor], label: Tensor, aux_weight: float, align_corners: bool) -> Tensor:
    """Cross entropy of "out" plus ``aux_weight`` times that of "aux" where there is one."""
    loss = cross_entropy(outputs["out"], label, align_corners)
    if "aux" in outputs:
        loss = loss + aux_weight * cross_entropy(outputs["aux"], label, align_corners)
    return loss
