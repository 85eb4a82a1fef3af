"""pyramid_pool: all levels of adaptive average pooling in one read of the feature map."""

from typing import Any

import torch
from torch import Tensor

from . import plain
from ._library import register_derivatives, run_plain, transforms_active
from .checks import (
    Bins,
    as_levels,
    check_channels,
    check_map,
    check_shape,
    check_tensor,
    count_cells,
    flatten,
    is_channels_last,
    unflatten,
)

_forward = torch.ops.pspnet_fast.pyramid_pool.default
_alone = torch.ops.pspnet_fast.pyramid_pool_alone.default
_backward = torch.ops.pspnet_fast.pyramid_pool_backward.default
_new_concat = torch.ops.pspnet_fast.new_concat.default


def pyramid_pool(input: Tensor, bins: Bins, *, concat: Tensor | None = None, offset: int = 0) -> Tensor:
    """Adaptive average pooling into all levels' bins, reading the input once (Zhao et al., CVPR 2017, section 3.2).

    Equivalent to `torch.cat([F.adaptive_avg_pool2d(input, b).flatten(2) for b in bins], 2).transpose(1, 2)`, and, with
    `concat`, to `concat[:, offset : offset + C] = input` besides, in the same pass.

    Args:
        input: (N, C, H, W) feature map, float32, float64, bfloat16 or float16, N >= 0, any H, W >= 1. Contiguous and
            channels-last maps and slices of them are read as they are; other strides are copied first.
        bins: for each level an int or a pair (bins_h, bins_w); bins may outnumber pixels. At most 16 levels.
        concat: (N, K, H, W), K >= offset + C, contiguous or channels-last: takes a copy of input, in place.
        offset: the first channel of that copy.

    Returns:
        (N, P, C), P the number of cells of all levels, level by level and row by row, in the dtype of input. Sums are
        taken in float32 (float64 for float64). The same bits on every run, forward and backward. Derivatives of any
        order, forward-mode and torch.func: docs/derivatives.md.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        RuntimeError: elements of the channels written share memory with each other, as expanded ones do, or with input,
            unless they are input, each its own copy already; concat is an inference tensor outside inference mode; out
            of memory.
    """
    check_map("input", input)
    levels = as_levels(bins)
    if concat is None:
        return _alone(input, flatten(levels))
    check_map("concat", concat, input)
    check_channels("concat", concat, offset, input.size(1))
    n, _, h, w = input.shape
    check_shape("concat", concat, (n, concat.size(1), h, w), "(N, K, H, W)")
    arguments = input, concat, offset, flatten(levels)
    return run_plain(plain.pyramid_pool, *arguments) if transforms_active() else _forward(*arguments)


def new_concat(input: Tensor, channels: int) -> Tensor:
    """An uninitialised (N, channels, H, W) in the dtype, device and memory format of a map (N, C, H, W).

    On a CPU a large one lies in memory that the package keeps: 256 MB at most while no tensor uses it, or
    PSPNET_FAST_KEEP_MB (0: none). Fresh memory of that size costs more time than everything that is written into it.

    Raises:
        TypeError, ValueError: an input of the wrong type, shape or dtype, or a number of channels below 0.
        RuntimeError: out of memory, or more bytes than 64 bits count.
    """
    check_tensor("input", input, "(N, C, H, W)")
    if torch.compiler.is_compiling():  # the compiler plans memory by itself
        return plain.new_concat(input, channels)
    if not isinstance(channels, int):
        raise TypeError(f"channels must be an int, but is {channels!r}")
    if not 0 <= channels < 1 << 63:
        raise ValueError(f"channels must be from 0 to 2^63 - 1, but are {channels}")
    return _new_concat(input, channels)


class PyramidPoolFunction(torch.autograd.Function):
    """Gradient of pyramid_pool; the gradient of the copy in concat is added in the same pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, concat: Tensor | None, offset: int, bins: list[int]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            pooled = _alone(input, bins) if concat is None else _forward(input, concat, offset, bins)
        ctx.set_materialize_grads(False)
        ctx.offset, ctx.bins, ctx.shape, ctx.channels_last = offset, bins, input.shape, is_channels_last(input)
        # Channels of concat that nobody has written yet: see PyramidUpsampleConcatFunction.
        ctx.fresh_concat = concat is not None and not concat.requires_grad
        if concat is None:
            return pooled
        ctx.mark_dirty(concat)
        return pooled, concat

    @staticmethod
    def backward(ctx: Any, grad_pooled: Tensor | None, grad_concat: Tensor | None = None) -> Any:
        n, c, h, w = ctx.shape
        if grad_pooled is None:
            if grad_concat is None:
                return None, None, None, None
            grad_pooled = grad_concat.new_zeros(n, count_cells(unflatten(ctx.bins)), c)
        grad_input = grad_before = None
        if ctx.needs_input_grad[0]:
            grad_input = _backward(grad_pooled, grad_concat, ctx.offset, ctx.bins, h, w, ctx.channels_last)
        if ctx.needs_input_grad[1] and grad_concat is not None:
            grad_before = grad_concat.clone()
            grad_before.narrow(1, ctx.offset, c).zero_()  # these channels were overwritten
        return grad_input, grad_before, None, None


def _recorded(input: Tensor, concat: Tensor | None, offset: int, bins: list[int]) -> Tensor:
    result = PyramidPoolFunction.apply(input, concat, offset, bins)
    return result if concat is None else result[0]


def _unrecorded(input: Tensor, channels: int) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return _new_concat(input, channels)


register_derivatives("new_concat", plain.new_concat, _unrecorded)
register_derivatives("pyramid_pool", plain.pyramid_pool, _recorded, mutated=1)
register_derivatives("pyramid_pool_alone", plain.pyramid_pool_alone, lambda x, bins: _recorded(x, None, 0, bins))
register_derivatives("pyramid_pool_backward", plain.pyramid_pool_backward)


@torch.library.register_fake("pspnet_fast::pyramid_pool_alone")
def _(input: Tensor, bins: list[int]) -> Tensor:
    return input.new_empty(input.size(0), count_cells(unflatten(bins)), input.size(1))


torch.library.register_fake("pspnet_fast::new_concat", plain.new_concat)


@torch.library.register_fake("pspnet_fast::pyramid_pool")
def _(input: Tensor, concat: Tensor | None, offset: int, bins: list[int]) -> Tensor:
    return input.new_empty(input.size(0), count_cells(unflatten(bins)), input.size(1))


@torch.library.register_fake("pspnet_fast::pyramid_pool_backward")
def _(
    grad_pooled: Tensor,
    grad_concat: Tensor | None,
    offset: int,
    bins: list[int],
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    n, _, c = grad_pooled.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((n, c, height, width), dtype=grad_pooled.dtype, device=grad_pooled.device, memory_format=layout)
