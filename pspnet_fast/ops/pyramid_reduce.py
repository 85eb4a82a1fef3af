"""pyramid_reduce: the 1x1 convolutions of all levels, with batch normalisation and ReLU folded in for inference."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import plain
from ._library import needs_grad, register_derivatives
from .checks import (
    Bins,
    Norm,
    as_levels,
    as_norm,
    check_flag,
    check_shape,
    check_tensor,
    count_cells,
    flatten,
    no_norm,
    scale_of,
    unflatten,
)

_forward = torch.ops.pspnet_fast.pyramid_reduce.default
_backward = torch.ops.pspnet_fast.pyramid_reduce_backward.default


def pyramid_reduce(
    pooled: Tensor, weights: Sequence[Tensor], bins: Bins, *, norm: Sequence[Norm] | None = None, relu: bool = False
) -> Tensor:
    """The 1x1 convolution of every level on its pooled cells, one launch for all levels.

    Equivalent, level by level, to `F.linear(pooled[:, cells], weight)`, then `F.batch_norm` with running statistics
    where `norm` is given, then ReLU where `relu`. With `norm` or `relu` it serves inference only; in training, the
    module's own norm and activation run on the small result.

    Args:
        pooled: (N, P, C), as pyramid_pool returns it.
        weights: one (R, C) or (R, C, 1, 1) tensor a level, in the dtype of pooled.
        bins: as given to pyramid_pool.
        norm: for each level (weight, bias, running_mean, running_var, eps), tensors (R,) in float32 or the dtype of
            pooled, the same for all.
        relu: whether to clamp the result at 0.

    Returns:
        (N, P, R) in the dtype of pooled; products are summed in float32 (float64 for float64), in a fixed order:
        the same bits on every run, and for an image alone and in a batch, but on a GPU below float64, where many rows
        are multiplied in other tiles than few. Derivatives of any order, forward-mode and torch.func:
        docs/derivatives.md.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; norm or relu where a gradient is
            needed.
    """
    levels = as_levels(bins)
    check_tensor("pooled", pooled, "(N, P, C)")
    n, _, c = pooled.shape
    check_shape("pooled", pooled, (n, count_cells(levels), c), "(N, cells of bins, C)")
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights must hold one tensor a level, but is {weights!r}")
    if len(weights) != len(levels):
        raise ValueError(
            f"weights must hold one tensor a level, {len(levels)} for bins {bins!r}, but holds {len(weights)}"
        )
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        check_tensor(
            name, weight, "(R, C, 1, 1)" if isinstance(weight, Tensor) and weight.dim() == 4 else "(R, C)", pooled
        )
        check_shape(
            name, weight, (weights[0].size(0), c, 1, 1)[: weight.dim()], "(R, C, 1, 1)"[: 6 * weight.dim() // 2]
        )
    if norm is not None and not isinstance(norm, Sequence):
        raise TypeError(f"norm must hold one tuple a level, but is {norm!r}")
    if norm is not None and len(norm) != len(levels):
        raise ValueError(f"norm must hold one tuple a level, {len(levels)} for bins {bins!r}, but holds {len(norm)}")
    norms = [as_norm(level) for level in norm or ()]
    tensors = [t for level, _ in norms for t in level]
    for t in tensors:
        check_shape("norm", t, (weights[0].size(0),), "(R,)")
        if t.dtype != tensors[0].dtype or t.dtype not in (torch.float32, pooled.dtype):
            raise TypeError(f"norm must be float32 or {pooled.dtype} throughout, but holds {t.dtype}")
        if t.device != pooled.device:
            raise ValueError(f"norm must be on the device of pooled, {pooled.device}, but holds a tensor on {t.device}")
    if (norm is not None or relu) and needs_grad(pooled, *weights, *tensors):
        raise ValueError(
            "norm and relu are for inference: leave them out where a gradient is needed, or use torch.no_grad()"
        )
    check_flag("relu", relu)
    eps = [eps for _, eps in norms]
    if not tensors and torch.compiler.is_exporting():
        tensors, eps = no_norm(pooled, weights[0].size(0)) * len(levels), [0.0] * len(levels)
    return _forward(pooled, list(weights), tensors, eps, relu, flatten(levels))


class PyramidReduceFunction(torch.autograd.Function):
    """Gradient of pyramid_reduce without ReLU, by pooled and weights alone."""

    @staticmethod
    def forward(
        ctx: Any, bins: list[int], norm: list[Tensor], eps: list[float], pooled: Tensor, *weights: Tensor
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            reduced = _forward(pooled, list(weights), norm, eps, False, bins)
        ctx.bins, ctx.norm, ctx.eps = bins, norm, eps
        ctx.save_for_backward(pooled, *weights)
        return reduced

    @staticmethod
    def backward(ctx: Any, grad_reduced: Tensor) -> Any:
        pooled, *weights = ctx.saved_tensors
        if ctx.norm:
            scales = [scale_of(ctx.norm[4 * i : 4 * i + 4], eps) for i, eps in enumerate(ctx.eps)]
            cells = [count_cells((level,)) for level in unflatten(ctx.bins)]
            rows = [scale.expand(count, -1) for scale, count in zip(scales, cells, strict=True)]
            grad_reduced = grad_reduced * torch.cat(rows).to(grad_reduced.dtype)
        grad_pooled, grad_weights = _backward(grad_reduced, pooled, weights, ctx.bins)
        shaped = [grad.view_as(weight) for grad, weight in zip(grad_weights.unbind(), weights, strict=True)]
        return None, None, None, grad_pooled, *shaped


def _recorded(
    pooled: Tensor, weights: list[Tensor], norm: list[Tensor], eps: list[float], relu: bool, bins: list[int]
) -> Tensor:
    if relu or needs_grad(*norm):
        raise RuntimeError("pyramid_reduce has no gradient with relu or by norm: they are for inference")
    return PyramidReduceFunction.apply(bins, norm, eps, pooled, *weights)


register_derivatives("pyramid_reduce", plain.pyramid_reduce, _recorded)
register_derivatives("pyramid_reduce_backward", plain.pyramid_reduce_backward)


@torch.library.register_fake("pspnet_fast::pyramid_reduce")
def _(
    pooled: Tensor, weights: list[Tensor], norm: list[Tensor], eps: list[float], relu: bool, bins: list[int]
) -> Tensor:
    return pooled.new_empty(pooled.size(0), pooled.size(1), weights[0].size(0))


@torch.library.register_fake("pspnet_fast::pyramid_reduce_backward")
def _(grad_reduced: Tensor, pooled: Tensor, weights: list[Tensor], bins: list[int]) -> tuple[Tensor, Tensor]:
    return (
        pooled.new_empty(pooled.shape),
        pooled.new_empty(len(weights), weights[0].size(0), pooled.size(2)),
    )
