"""The weight of a convolution split by input channels: those of dense maps, and those of levels with few cells."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops.checks import is_channels_last

_operators: Any = torch.ops.pspnet_fast
_split, _split_backward = _operators.pyramid_split_weight.default, _operators.pyramid_split_weight_backward.default
_reduce, _reduce_backward = _operators.pyramid_reduce.default, _operators.pyramid_reduce_backward.default
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")
MANY_CELLS = 1024  # of a level, enough to fill a matrix product of one image
Channels = tuple[int, int]  # the first input channel of a part, and how many


def why_not_split(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int], groups: int
) -> str:
    """Why a convolution is none that is split so, one that keeps the size of a map, or an empty string."""
    same = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
    if any(k % 2 == 0 for k in kernel) or tuple(stride) != (1, 1) or groups != 1:
        return "must have an odd kernel size, stride 1 and one group"
    if padding != "same" and tuple(padding) != same:
        return f"must be padded by {same} zeros, which keeps the size"
    return ""


def split_product(
    weight: Tensor, dense: Sequence[Channels], parts: Sequence[Channels], levels: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor]:
    """A copy of the dense maps' part of a weight, and the products of the levels' parts with the levels.

    Nothing is kept between two calls: the copy, as F.conv2d would make it, and the rearranged parts lie in memory that
    is (ops.new_concat), which makes them cheap.

    Args:
        weight: (O, C, kh, kw).
        dense: the input channels of the dense maps, in their order.
        parts: those of each level; there may be others, which take no part.
        levels: (N, cells of l, channels of l) each, in the dtype of the result.

    Returns:
        (O, dense channels, kh, kw) in the dtype of weight, or None where there are none; taps (N, P, kh * kw, O) in the
        dtype of the levels, as ops.pyramid_context_ takes them.
    """
    if torch.compiler.is_compiling():  # the compiler plans by itself what to copy and to keep
        return _plain(weight, dense, parts, levels)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *levels)):
        result: Any = SplitProduct.apply(weight, tuple(dense), tuple(parts), *levels)
        return result
    return _dense_weight(weight, dense), _taps(weight, parts, levels)


def level_products(
    weight: Tensor, dense: int, dense_first: bool, reduced: Tensor, bins: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in two launches, where levels of equally many channels take all channels but those of one dense map.

    For few cells, as pyramid pooling has them: the products are pyramid_reduce's.

    Args:
        weight: (O, dense + L * R, kh, kw); its dense channels come first or last.
        reduced: (N, P, R) in `dtype`, that of the results: the weight's, or a lower one than its float32.
        bins: of the L levels, flattened.

    Returns:
        (O, dense, kh, kw) and taps (N, P, kh * kw, O).
    """
    if torch.is_grad_enabled() and (weight.requires_grad or reduced.requires_grad):
        first, taps, _ = LevelProducts.apply(weight, reduced, dense, dense_first, bins, dtype)
        return first, taps
    with torch._C._AutoDispatchBelowADInplaceOrView():
        first, matrices = _split(weight, dense, dense_first, len(bins) // 2, dtype)
        return first, taps_of(reduced, matrices, bins, weight)


def taps_of(reduced: Tensor, matrices: Tensor, bins: list[int], weight: Tensor) -> Tensor:
    """The levels' products with the parts of a weight that ops.pyramid_split_weight gives: (N, P, kh * kw, O)."""
    o, _, kh, kw = weight.shape
    products = _reduce(reduced, list(matrices.unbind()), [], [], False, bins)
    return products.view(*products.shape[:2], kh * kw, o)


class LevelProducts(torch.autograd.Function):
    """level_products with its gradient; the matrices are an output, through which a recorded one has derivatives."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, reduced: Tensor, dense: int, dense_first: bool, bins: list[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            first, matrices = _split(weight, dense, dense_first, len(bins) // 2, dtype)
            taps = taps_of(reduced, matrices, bins, weight)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.bins = (dense_first, is_channels_last(weight), weight.dtype), bins
        ctx.first = first.shape
        ctx.save_for_backward(reduced, matrices)
        return first, taps, matrices

    @staticmethod
    def backward(ctx: Any, grad_first: Tensor | None, grad_taps: Tensor | None, grad_matrices: Tensor | None) -> Any:
        reduced, matrices = ctx.saved_tensors
        grad_weight = grad_reduced = None
        with nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowADInplaceOrView():
            if grad_taps is not None:
                grad = grad_taps.reshape(*reduced.shape[:2], matrices.size(1))
                grad_reduced, more = _reduce_backward(grad, reduced, list(matrices.unbind()), ctx.bins)
                grad_matrices = more if grad_matrices is None else grad_matrices + more
            if ctx.needs_input_grad[0] and (grad_first is not None or grad_matrices is not None):
                grad_first = matrices.new_zeros(ctx.first) if grad_first is None else grad_first
                grad_matrices = matrices.new_zeros(matrices.shape) if grad_matrices is None else grad_matrices
                grad_weight = _split_backward(grad_first, grad_matrices, *ctx.settings)
        return grad_weight, grad_reduced, None, None, None, None


class SplitProduct(torch.autograd.Function):
    """split_product with its gradient.

    The levels' part is rearranged a level at a time, in backward once more, so that no copy of the whole is kept; the
    gradient of the whole is written once.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dense: Any, parts: Any, *levels: Tensor) -> tuple[Tensor | None, Tensor]:
        ctx.save_for_backward(weight, *levels)
        ctx.dense, ctx.parts = dense, parts
        return _dense_weight(weight, dense), _taps(weight, parts, levels)

    @staticmethod
    def backward(ctx: Any, grad_dense: Tensor | None, grad_taps: Tensor) -> Any:
        weight, *levels = ctx.saved_tensors
        if torch.is_grad_enabled() or _in_batches(grad_dense) or _in_batches(grad_taps):
            grad_weight, *grad_levels = _differentiable(ctx, weight, levels, grad_dense, grad_taps)
            return grad_weight, None, None, *grad_levels
        o, _, kh, kw = weight.shape
        grad_weight = ops.new_concat(weight, weight.size(1))
        if sum(channels for _, channels in (*ctx.dense, *ctx.parts)) < weight.size(1):
            grad_weight.zero_()  # channels that take no part
        at = 0
        for start, channels in ctx.dense:
            grad_weight.narrow(1, start, channels).copy_(grad_dense.narrow(1, at, channels))  # type: ignore[union-attr]
            at += channels
        grad_levels = []
        cells = [z.size(1) for z in levels]
        for (start, channels), z, g in zip(ctx.parts, levels, grad_taps.split(cells, 1), strict=True):
            rows = g.reshape(-1, kh * kw * o)
            matrix = _by_taps(weight.narrow(1, start, channels), z.dtype)
            grad_levels.append((rows @ matrix).view(z.shape))
            products = (rows.t() @ z.flatten(0, 1)).view(kh, kw, o, channels)
            grad_weight.narrow(1, start, channels).copy_(products.permute(2, 3, 0, 1))
        return grad_weight, None, None, *grad_levels


def _differentiable(
    ctx: Any, weight: Tensor, levels: Sequence[Tensor], grad_dense: Tensor | None, grad_taps: Tensor
) -> list[Tensor | None]:
    """The gradients as plain torch computes them, which can be differentiated again and come in batches."""
    again, grads = torch.is_grad_enabled(), (grad_dense, grad_taps)
    with torch.enable_grad():
        results = _plain(weight, ctx.dense, ctx.parts, levels)
    given = [(r, g) for r, g in zip(results, grads, strict=True) if r is not None and g is not None and r.requires_grad]
    inputs = [weight, *levels]
    wanted = [t for t in inputs if t.requires_grad]
    outputs, grad_outputs = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=again, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def _in_batches(tensor: Tensor | None) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) has made it: then nothing can be written in place."""
    return tensor is not None and torch._C._dispatch_keys(tensor).has(_BATCHED)


def _plain(
    weight: Tensor, dense: Sequence[Channels], parts: Sequence[Channels], levels: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor]:
    o, _, kh, kw = weight.shape
    first = torch.cat([weight.narrow(1, *channels) for channels in dense], 1) if dense else None
    products = []
    for channels, z in zip(parts, levels, strict=True):
        matrix = weight.narrow(1, *channels).permute(2, 3, 0, 1).reshape(kh * kw * o, -1).to(z.dtype)
        products.append(z @ matrix.t())
    return first, torch.cat(products, 1).unflatten(2, (kh * kw, o))


def _dense_weight(weight: Tensor, dense: Sequence[Channels]) -> Tensor | None:
    if not dense:
        return None
    first = ops.new_concat(weight, sum(channels for _, channels in dense))
    at = 0
    for start, channels in dense:
        first.narrow(1, at, channels).copy_(weight.narrow(1, start, channels))
        at += channels
    return first


def _taps(weight: Tensor, parts: Sequence[Channels], levels: Sequence[Tensor]) -> Tensor:
    o, _, kh, kw = weight.shape
    n, dtype = levels[0].size(0), levels[0].dtype
    taps = weight.new_empty(n, sum(z.size(1) for z in levels), kh * kw, o, dtype=dtype)
    at = 0
    for channels, z in zip(parts, levels, strict=True):
        part, to = weight.narrow(1, *channels), taps.narrow(1, at, z.size(1))
        if part.stride(1) == 1 and kh * kw > 1:  # a view that a matrix product takes as it is
            matrix = part.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)
            to.copy_((z.flatten(0, 1) @ matrix.t()).view(n, -1, o, kh * kw).transpose(2, 3))
        else:
            matrix = part.flatten(1).to(dtype) if kh * kw == 1 else _by_taps(part, dtype)
            if n == 1 or z.size(1) >= MANY_CELLS:  # image by image into their places, which lie apart
                for image, place in zip(z, to.flatten(2), strict=True):
                    torch.mm(image, matrix.t(), out=place)
            else:
                to.copy_((z.flatten(0, 1) @ matrix.t()).view(to.shape))
        at += z.size(1)
    return taps


def _by_taps(part: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, C, kh, kw) -> (kh * kw * O, C), a copy."""
    o, c, kh, kw = part.shape
    matrix = ops.new_concat(part.to(dtype) if part.dtype != dtype else part, c)
    rows = matrix.as_strided((kh, kw, o, c), (kw * o * c, o * c, c, 1))  # the same memory, whatever its layout
    return rows.copy_(part.permute(2, 3, 0, 1)).view(kh * kw * o, c)
