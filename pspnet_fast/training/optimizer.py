"""SGD and AdamW with a faster head, the poly schedule, and the loss of a PSPNet."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.losses import UpsampleCrossEntropyLoss
from pspnet_fast.region_losses import UpsampleDiceLoss, UpsampleLovaszLoss
from pspnet_fast.training.config_train import HEAD, TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Optimizer of two groups: backbone, and the children ``config.head`` at ``head_lr_factor`` times the rate."""
    head: list[nn.Parameter] = []
    backbone: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if name.partition(".")[0] in config.head else backbone).append(parameter)
    groups = [
        {"params": backbone, "initial_lr": config.lr},
        {"params": head, "initial_lr": config.lr * config.head_lr_factor},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, step: int, steps: int, config: TrainConfig) -> float:
    """Set the rates of the iteration that ``step`` of ``steps`` come before in every group; return the first.

    min_lr + (initial_lr - min_lr) * (1 - step / steps) ** power, which with ``reach_min_lr`` ends one iteration
    earlier, times (step + 1) / (warmup + 1) in the first ``warmup`` iterations.
    """
    left = max(1 - step / max(steps - config.reach_min_lr, 1), 0.0)
    rise = min((step + 1) / (config.warmup + 1), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rise * (config.min_lr + (group["initial_lr"] - config.min_lr) * left**config.power)
    return optimizer.param_groups[0]["lr"]


def backbone_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms outside the head."""
    modules = model.named_modules()
    return [module for name, module in modules if isinstance(module, _BatchNorm) and name.partition(".")[0] not in HEAD]


def make_loss(config: TrainConfig, align_corners: bool) -> UpsampleCrossEntropyLoss:
    """Cross entropy over the pixels whose label is not 255, at the label's size, as ``config`` asks for it.

    It is a sum, but with ``ohem``, which chooses its pixels by the losses, a mean.
    """
    return UpsampleCrossEntropyLoss(
        align_corners=align_corners,
        weight=None if config.class_weights is None else torch.tensor(config.class_weights),
        ignore_index=IGNORE_INDEX,
        label_smoothing=config.label_smoothing,
        reduction="mean" if config.ohem else "sum",
        ohem=config.ohem,
        threshold=config.ohem_threshold,
        min_kept=config.ohem_min_kept,
    )


class RegionLoss(nn.Module):
    """The Dice and Lovasz-softmax losses that ``config`` asks for, times their factors, at the label's size."""

    def __init__(self, config: TrainConfig, align_corners: bool) -> None:
        super().__init__()
        terms = [
            (config.dice, UpsampleDiceLoss(align_corners=align_corners, ignore_index=IGNORE_INDEX)),
            (config.lovasz, UpsampleLovaszLoss(align_corners=align_corners, ignore_index=IGNORE_INDEX)),
        ]
        self._terms = [(factor, loss) for factor, loss in terms if factor > 0]

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits (N, K, h, w), label (N, H, W) -> a number."""
        return torch.stack([factor * loss(logits, label) for factor, loss in self._terms]).sum()


def pspnet_loss(loss: nn.Module, outputs: Mapping[str, Tensor], label: Tensor, aux_weight: float) -> Tensor:
    """``loss`` of "out" plus ``aux_weight`` times that of "aux" where there is one."""
    total = loss(outputs["out"], label)
    if "aux" in outputs:
        total = total + aux_weight * loss(outputs["aux"], label)
    return total
