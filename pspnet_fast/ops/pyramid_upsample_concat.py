"""pyramid_upsample_concat_: bilinear upsampling of every level straight into the concatenation."""

from typing import Any

import torch
from torch import Tensor

from . import plain
from ._library import register_derivatives, run_plain, transforms_active
from .checks import (
    Bins,
    as_levels,
    check_channels,
    check_flag,
    check_map,
    check_shape,
    check_tensor,
    count_cells,
    flatten,
    unflatten,
)
from .pyramid_pool import PyramidPoolFunction

_forward = torch.ops.pspnet_fast.pyramid_upsample_concat_.default
_backward = torch.ops.pspnet_fast.pyramid_upsample_concat_backward.default


def pyramid_upsample_concat_(
    concat: Tensor, reduced: Tensor, bins: Bins, *, offset: int, align_corners: bool = True
) -> Tensor:
    """Upsamples every level to H x W into its channels of a concatenation, in place, writing each element once.

    Equivalent to, for level l of bins b_l, `concat[:, offset + l * R : offset + (l + 1) * R] =
    F.interpolate(reduced of l as (N, R, b_l, b_l), (H, W), mode="bilinear", align_corners=align_corners)`.

    Args:
        concat: (N, K, H, W), K >= offset + L * R, contiguous or channels-last, float32, float64, bfloat16 or float16.
        reduced: (N, P, R), as pyramid_reduce returns it, in the dtype of concat.
        bins: as given to pyramid_pool; L levels.
        offset: the first channel of the first level.
        align_corners: as in F.interpolate.

    Returns:
        concat. Interpolation is done in float32 (float64 for float64). The same bits on every run, forward and
        backward: no atomics. Derivatives of any order, forward-mode and torch.func: docs/derivatives.md.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        RuntimeError: elements of the channels written share memory with each other, as expanded ones do, or with
            reduced; concat is an inference tensor outside inference mode; out of memory.
    """
    levels = as_levels(bins)
    check_map("concat", concat)
    check_tensor("reduced", reduced, "(N, P, R)", concat)
    check_shape("reduced", reduced, (concat.size(0), count_cells(levels), reduced.size(2)), "(N, cells of bins, R)")
    check_channels("concat", concat, offset, len(levels) * reduced.size(2))
    check_flag("align_corners", align_corners)
    arguments = concat, reduced, offset, flatten(levels), align_corners
    if transforms_active():
        run_plain(plain.pyramid_upsample_concat_, *arguments)
    else:
        _forward(*arguments)
    return concat


class PyramidUpsampleConcatFunction(torch.autograd.Function):
    """Gradient of pyramid_upsample_concat_."""

    @staticmethod
    def forward(ctx: Any, concat: Tensor, reduced: Tensor, offset: int, bins: list[int], align_corners: bool) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            _forward(concat, reduced, offset, bins, align_corners)
        ctx.mark_dirty(concat)
        ctx.offset, ctx.bins, ctx.align_corners, ctx.channels = offset, bins, align_corners, reduced.size(2)
        ctx.hand_on = _only_other_channels_need_grad(concat, offset, len(bins) // 2 * reduced.size(2))
        return concat

    @staticmethod
    def backward(ctx: Any, grad_concat: Tensor) -> Any:
        grad_before = grad_reduced = None
        if ctx.needs_input_grad[1]:
            grad_reduced = _backward(grad_concat, ctx.offset, ctx.channels, ctx.bins, ctx.align_corners)
        if ctx.needs_input_grad[0]:
            grad_before = grad_concat
            if not ctx.hand_on:
                grad_before = grad_concat.clone()
                grad_before.narrow(1, ctx.offset, len(ctx.bins) // 2 * ctx.channels).zero_()
        return grad_before, grad_reduced, None, None, None


def _only_other_channels_need_grad(concat: Tensor, first: int, channels: int) -> bool:
    """Whether the gradient of what concat held before may be handed on as it is, without a copy.

    In the channels written here it has to be 0. Where concat comes from pyramid_pool, fresh but for the copy, the
    backward of pyramid_pool reads the copied channels only: the zeros are nobody's concern.
    """
    if not isinstance(concat.grad_fn, PyramidPoolFunction._backward_cls):
        return False
    producer: Any = concat.grad_fn  # the context of PyramidPoolFunction
    if not producer.fresh_concat:
        return False
    return first >= producer.offset + producer.shape[1] or first + channels <= producer.offset


def _recorded(*args: Any) -> None:
    PyramidUpsampleConcatFunction.apply(*args)


register_derivatives("pyramid_upsample_concat_", plain.pyramid_upsample_concat_, _recorded, mutated=0)
register_derivatives("pyramid_upsample_concat_backward", plain.pyramid_upsample_concat_backward)


@torch.library.register_fake("pspnet_fast::pyramid_upsample_concat_")
def _(concat: Tensor, reduced: Tensor, offset: int, bins: list[int], align_corners: bool) -> None:
    return None


@torch.library.register_fake("pspnet_fast::pyramid_upsample_concat_backward")
def _(grad_concat: Tensor, offset: int, channels: int, bins: list[int], align_corners: bool) -> Tensor:
    return grad_concat.new_empty(grad_concat.size(0), count_cells(unflatten(bins)), channels)
