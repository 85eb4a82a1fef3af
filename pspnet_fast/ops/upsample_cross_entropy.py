"""upsample_cross_entropy: cross entropy at full resolution, of logits that are never upsampled as a whole."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import plain
from ._library import register_derivatives
from .checks import (
    REDUCTIONS,
    Reduction,
    check_dense,
    check_flag,
    check_integer,
    check_map,
    check_number,
    check_size,
    memory_format,
)

TARGETS = (torch.uint8, torch.int16, torch.int32, torch.int64)

_forward = torch.ops.pspnet_fast.upsample_cross_entropy.default
_backward = torch.ops.pspnet_fast.upsample_cross_entropy_backward.default


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    size: Sequence[int] | None = None,
    align_corners: bool = True,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross entropy of bilinearly upsampled logits, holding one float a pixel instead of K.

    Equivalent to `F.cross_entropy(F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners),
    target.long(), weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)`, also for
    logits that are infinite, huge or NaN (a target of -inf costs inf), with these differences: the mean over no pixel
    (all ignored, or of weight 0) is 0 with zero gradient instead of NaN; a bad target on a GPU does not abort it;
    a logit of -inf does not count where its weight is 0, which F.interpolate makes NaN (0 * inf); and at ignored pixels
    NaN or +inf makes NaN of that logit's gradient alone. A pixel's logits are interpolated in registers, forward for
    their log-sum-exp, and again backward.

    Args:
        logits: (N, K, h, w), K >= 1, float32, float64, bfloat16 or float16. Contiguous and channels-last maps and
            slices of them are read as they are; other strides are copied first.
        target: (N, H, W) class indices, uint8, int16, int32 or int64; any scale, up or down.
        size: (H, W), by default those of target; given, it must be them.
        align_corners: as in F.interpolate.
        weight: (K,) factors of the classes, on the device of logits; they get no gradient.
        ignore_index: the target of pixels that do not count.
        label_smoothing: from 0 to 1, as in F.cross_entropy.
        reduction: "mean" (by the targets' weights), "sum" or "none".

    Returns:
        A number, for "none" (N, H, W) with 0 at ignored pixels; in float32 for logits of 16 or 32 bits, else float64,
        as is all arithmetic; the log-sum-exp is kept so, too, which leaves softmax off by that number's rounding. The
        same bits on every run, forward and backward: no atomics. Second and forward-mode derivatives and
        torch.func are right, but hold the upsampled logits (docs/derivatives.md).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        IndexError: on a CPU, a target that is neither a class nor ignore_index, as in F.cross_entropy; the message
            tells it and where. On a GPU, which could raise this only by waiting for the device, the loss and the
            gradient around that pixel are NaN instead; under `torch.autograd.set_detect_anomaly(True)` the targets are
            checked first.
        RuntimeError: out of memory.
    """
    check_map("logits", logits)
    check_target(target, logits)
    if size is not None and check_size(size) != tuple(target.shape[1:]):
        raise ValueError(f"size must be that of target, {tuple(target.shape[1:])}, but is {tuple(size)}")
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if weight is not None:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"weight must be a Tensor of floating-point numbers, shape (K,), but is {weight!r}")
        check_dense("weight", weight)
        if weight.shape != (logits.size(1),):
            raise ValueError(f"weight must have shape (K,) = ({logits.size(1)},), but has {tuple(weight.shape)}")
        if weight.device != logits.device:
            raise ValueError(f"weight must be on the device of logits, {logits.device}, but is on {weight.device}")
        weight = weight.detach().to(accumulator)
    check_flag("align_corners", align_corners)
    check_integer("ignore_index", ignore_index)
    label_smoothing = check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, but is {label_smoothing!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, but is {reduction!r}")
    # compiled code has no anomaly mode; torch 2.11 cannot even compile the question
    if target.device.type != "cpu" and not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        check_values(target, logits.size(1), ignore_index)
    number = REDUCTIONS.index(reduction)
    loss, _, _ = _forward(logits, target, weight, align_corners, ignore_index, label_smoothing, number)
    return loss


def check_target(target: Tensor, logits: Tensor) -> None:
    if not isinstance(target, Tensor) or target.dtype not in TARGETS:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be a Tensor of uint8, int16, int32 or int64, but is {kind}")
    check_dense("target", target)
    if target.dim() != 3 or target.size(0) != logits.size(0) or target.size(1) < 1 or target.size(2) < 1:
        raise ValueError(
            f"target must have shape (N, H, W), N = {logits.size(0)}, H >= 1 and W >= 1, but has {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of logits, {logits.device}, but is on {target.device}")


def check_values(target: Tensor, classes: int, ignore_index: int) -> None:
    bad = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if bad.numel() > 0:
        raise IndexError(
            f"target must be from 0 to {classes - 1} or ignore_index {ignore_index}, but holds {bad[0].item()}"
        )


class UpsampleCrossEntropyFunction(torch.autograd.Function):
    """Gradient of upsample_cross_entropy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, *settings: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            loss, lse, total_weight = _forward(logits, target, weight, *settings)
        ctx.settings = settings
        ctx.mark_non_differentiable(lse, total_weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, lse, total_weight)
        return loss, lse, total_weight

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        nothing = (None,) * (2 + len(ctx.settings))
        if grad_loss is None:
            return None, *nothing
        return _backward(grad_loss, *ctx.saved_tensors, *ctx.settings), *nothing


register_derivatives("upsample_cross_entropy", plain.upsample_cross_entropy, UpsampleCrossEntropyFunction.apply)
register_derivatives("upsample_cross_entropy_backward", plain.upsample_cross_entropy_backward)


@torch.library.register_fake("pspnet_fast::upsample_cross_entropy")
def _(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    lse = logits.new_empty(target.shape, dtype=accumulator)
    loss = logits.new_empty(target.shape if reduction == 0 else (), dtype=accumulator)
    return loss, lse, logits.new_empty((), dtype=accumulator)


@torch.library.register_fake("pspnet_fast::upsample_cross_entropy_backward")
def _(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    total_weight: Tensor,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> Tensor:
    return torch.empty_like(logits, memory_format=memory_format(logits))
