"""UpsampleCrossEntropyLoss: cross entropy at full resolution without full-resolution logits."""

import math

import torch
from torch import Tensor, nn

from . import ops
from .ops.upsample_cross_entropy import REDUCTIONS, Reduction


class UpsampleCrossEntropyLoss(nn.Module):
    """Cross entropy of logits (N, K, h, w), upsampled on the fly, against targets (N, H, W).

    Without `ohem` it is ops.upsample_cross_entropy. With it only hard pixels count (online hard example mining, as
    mmsegmentation's OHEMPixelSampler picks them): those whose loss says that the target has a probability below
    `threshold`, or, where these are fewer than `min_kept` times N, that many of the greatest loss, and whatever equals
    the last of them. The mean or sum is over the kept pixels; a mean counts each as 1. Loss means what the operator
    gives for the pixel, class weight and label smoothing included. It takes some numbers a pixel, but no logits.
    Derivatives beyond the first, forward-mode AD and torch.func are right, but hold the upsampled logits.

    Args:
        align_corners, weight, ignore_index, label_smoothing, reduction: as in ops.upsample_cross_entropy. `weight` is
            kept as a buffer that state_dict does not hold.
        ohem: whether to keep hard pixels only; then reduction must be "mean" or "sum".
        threshold: above 0, at most 1; pixels below this probability count.
        min_kept: pixels an image that count at least, if it has as many that are not ignored.

    Raises:
        ValueError: an argument outside its range.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        align_corners: bool = True,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        ohem: bool = False,
        threshold: float = 0.7,
        min_kept: int = 100_000,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS or (ohem and reduction == "none"):
            allowed = REDUCTIONS[1:] if ohem else REDUCTIONS
            raise ValueError(f"reduction must be one of {', '.join(map(repr, allowed))}, but is {reduction!r}")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, but is {threshold!r}")
        if min_kept < 0:
            raise ValueError(f"min_kept must be at least 0, but is {min_kept!r}")
        self.align_corners, self.ignore_index, self.label_smoothing = align_corners, ignore_index, label_smoothing
        self.reduction: Reduction = reduction
        self.ohem, self.threshold, self.min_kept = ohem, threshold, min_kept
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, K, h, w) against class indices (N, H, W)."""
        losses = ops.upsample_cross_entropy(
            logits,
            target,
            align_corners=self.align_corners,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none" if self.ohem else self.reduction,
        )
        if not self.ohem:
            return losses
        kept = self._hard(losses.detach(), target)
        total = torch.where(kept, losses, 0).sum()
        return total if self.reduction == "sum" else total / kept.sum().clamp(min=1)

    def _hard(self, losses: Tensor, target: Tensor) -> Tensor:
        valid = target != self.ignore_index
        ranks = torch.where(valid, losses, -1)  # no loss is below 0
        bound = ranks.new_tensor(-math.log(self.threshold))
        count = min(self.min_kept * target.size(0), ranks.numel())
        if count > 0:
            bound = bound.minimum(ranks.flatten().topk(count, sorted=False).values.min())
        # not "at least": a loss that is not a number must show
        return valid & ~(ranks < bound)

    def extra_repr(self) -> str:
        """The arguments that matter."""
        text = f"align_corners={self.align_corners}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        return f"{text}, threshold={self.threshold}, min_kept={self.min_kept}" if self.ohem else text
