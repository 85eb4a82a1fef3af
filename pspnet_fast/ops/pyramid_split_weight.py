"""pyramid_split_weight: a convolution's weight by its input channels, those of a map and those of the levels."""

from typing import Any

import torch
from torch import Tensor

from . import plain
from ._library import register_derivatives
from .checks import DTYPES, MAX_LEVELS, check_flag, check_tensor, is_channels_last

_forward = torch.ops.pspnet_fast.pyramid_split_weight.default
_backward = torch.ops.pspnet_fast.pyramid_split_weight_backward.default


def pyramid_split_weight(
    weight: Tensor, dense: int, levels: int, *, dense_first: bool = True, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The parts of a convolution's weight, each as whoever multiplies with it takes it, in one read of the weight.

    Equivalent, with `w = weight.to(dtype)`, to `w[:, :dense]` and, of each level's channels after these, to
    `w[:, channels].permute(2, 3, 0, 1).reshape(kh * kw * O, R)`.

    Args:
        weight: (O, dense + levels * R, kh, kw), float32, float64, bfloat16 or float16. Contiguous and channels-last
            weights are read as they are; others are copied first.
        dense: input channels of the map.
        levels: number of levels, from 1 to 16, which share the other channels.
        dense_first: whether the map's channels are the first, else the last.
        dtype: of the results: that of weight, or bfloat16 or float16 for a weight in float32; by default the former.

    Returns:
        (O, dense, kh, kw) in the memory format of weight, and (levels, kh * kw * O, R), the weights of a pyramid_reduce
        that gives what `pyramid_context_` takes as taps. Derivatives of any order, forward-mode and torch.func.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype.
    """
    check_tensor("weight", weight, "(O, C, kh, kw)")
    if min(weight.shape) < 1:
        raise ValueError(f"weight must have no dimension of size 0, but has shape {tuple(weight.shape)}")
    for name, value, most in (("dense", dense, weight.size(1) - 1), ("levels", levels, MAX_LEVELS)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, but is {value!r}")
        if not 1 <= value <= most:
            raise ValueError(
                f"{name} must be from 1 to {most} for a weight of {weight.size(1)} channels, but is {value}"
            )
    if (weight.size(1) - dense) % levels:
        raise ValueError(
            f"levels must share weight's other {weight.size(1) - dense} channels evenly, but there are {levels}"
        )
    check_flag("dense_first", dense_first)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES or (dtype != weight.dtype and (weight.dtype, dtype) not in _NARROWER):
        raise TypeError(f"dtype must be that of weight, {weight.dtype}, or below float32, but is {dtype!r}")
    result: tuple[Tensor, Tensor] = _forward(weight, dense, dense_first, levels, dtype)
    return result


_NARROWER = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}


class PyramidSplitWeightFunction(torch.autograd.Function):
    """Gradient of pyramid_split_weight: the parts' gradients, put together."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dense: int, dense_first: bool, levels: int, dtype: torch.dtype) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            parts = _forward(weight, dense, dense_first, levels, dtype)
        ctx.settings = dense_first, is_channels_last(weight), weight.dtype
        return parts

    @staticmethod
    def backward(ctx: Any, grad_dense: Tensor, grad_matrices: Tensor) -> Any:
        return _backward(grad_dense, grad_matrices, *ctx.settings), None, None, None, None


def _recorded(*args: Any) -> Any:
    return PyramidSplitWeightFunction.apply(*args)


register_derivatives("pyramid_split_weight", plain.pyramid_split_weight, _recorded)
register_derivatives("pyramid_split_weight_backward", plain.pyramid_split_weight_backward)


@torch.library.register_fake("pspnet_fast::pyramid_split_weight")
def _(weight: Tensor, dense: int, dense_first: bool, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    o, c, kh, kw = weight.shape
    layout = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    first = torch.empty((o, dense, kh, kw), dtype=dtype, device=weight.device, memory_format=layout)
    return first, weight.new_empty((levels, kh * kw * o, (c - dense) // levels), dtype=dtype)


@torch.library.register_fake("pspnet_fast::pyramid_split_weight_backward")
def _(grad_dense: Tensor, grad_matrices: Tensor, dense_first: bool, channels_last: bool, dtype: torch.dtype) -> Tensor:
    o, dense, kh, kw = grad_dense.shape
    c = dense + grad_matrices.size(0) * grad_matrices.size(2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((o, c, kh, kw), dtype=dtype, device=grad_dense.device, memory_format=layout)
