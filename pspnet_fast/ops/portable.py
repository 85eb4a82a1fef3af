"""The operators for devices and runtimes without our kernels: products with small matrices.

No adaptive pooling and no resizing of few cells: pooling is a product with a matrix of averages, upsampling one
with a matrix of weights, both made of the sizes, so that they are right for sizes that no bin divides and, in exported
programs, for sizes that are known at run time only. Forward and backward, with the arguments of the compiled operators.
They run on every device without kernels of ours, and in place of the operators in `with Portable():`.
"""

import functools
import threading
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..reference import wide
from . import plain
from ._library import register_fallback
from .checks import NEAREST, count_cells, scale_of, unflatten

FEW_CELLS = 128  # of all levels, for which one product with all weights at once takes next to no time


class Portable(TorchFunctionMode):
    """Within it every operator of ours runs as torch's own operations: for exports to other runtimes."""

    def __enter__(self) -> Any:
        _modes().append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _modes().pop()
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(function, *args, **(kwargs or {}))

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """What runs for a function of torch's or an operator of ours."""
        return _TABLE.get(function, function)(*args, **kwargs)


_within = threading.local()


def _modes() -> list[Portable]:
    if not hasattr(_within, "modes"):
        _within.modes = []
    return _within.modes


def exporting() -> Portable | None:
    """The mode that the caller is exported within: what depends on weights alone is then computed once, for all."""
    if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
        return None
    return _modes()[-1] if _modes() else None  # torch's own stack lacks the mode whose function runs


# ---- pooling -------------------------------------------------------------------------------------------------------


def pyramid_pool(input: Tensor, concat: Tensor | None, offset: int, bins: list[int]) -> Tensor:
    if concat is not None:
        concat.narrow(1, offset, input.size(1)).copy_(input)
    return pyramid_pool_alone(input, bins)


def pyramid_pool_alone(input: Tensor, bins: list[int]) -> Tensor:
    map = wide(input)
    cells = map.flatten(2) @ _averages(bins, input.size(2), input.size(3), map)
    return cells.transpose(1, 2).to(input.dtype)


def pyramid_pool_backward(
    grad_pooled: Tensor,
    grad_concat: Tensor | None,
    offset: int,
    bins: list[int],
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    c = grad_pooled.size(2)
    cells = wide(grad_pooled).transpose(1, 2)
    grad = (cells @ _averages(bins, height, width, cells).t()).unflatten(2, (height, width))
    if grad_concat is not None:
        grad = grad + grad_concat.narrow(1, offset, c)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return grad.to(grad_pooled.dtype, memory_format=layout)


def _averages(bins: list[int], height: int, width: int, like: Tensor) -> Tensor:
    """(H * W, P): what each pixel counts in the average of each cell."""
    rows, columns = _axes(bins, like)
    inside = (_covers(*rows, height)[:, None] & _covers(*columns, width)).flatten(0, 1).to(like.dtype)
    return inside / inside.sum(0)


def _covers(index: Tensor, bins: Tensor, size: int) -> Tensor:
    """(size, P): whether bin number `index` of `bins`, from floor(i * size / b) to ceil((i + 1) * size / b), has it."""
    distance = torch.arange(size, device=index.device)[:, None] * bins - index * size
    return (distance > -bins) & (distance < size)


def _axes(bins: list[int], like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each cell the number of its row and how many rows its level has, (P,) both; and columns alike."""
    cells = [(i, h, j, w) for h, w in unflatten(bins) for i in range(h) for j in range(w)]
    rows, row_bins, columns, column_bins = torch.tensor(cells, device=like.device).unbind(1)
    return [(rows, row_bins), (columns, column_bins)]


def _adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """torch's function, of which runtimes know no sizes that do not divide the map's, and none but fixed ones."""
    h, w = (output_size, output_size) if isinstance(output_size, int) else output_size
    if input.dim() != 4 or h is None or w is None or h == w == 1:
        return F.adaptive_avg_pool2d(input, output_size)
    return pyramid_pool_alone(input, [h, w]).transpose(1, 2).unflatten(2, (h, w))


# ---- reduction -----------------------------------------------------------------------------------------------------


def pyramid_reduce(
    pooled: Tensor, weights: list[Tensor], norm: list[Tensor], eps: list[float], relu: bool, bins: list[int]
) -> Tensor:
    counts, shifts, products = _counts(bins), [], []
    for i, cells in enumerate(wide(pooled).split(counts, 1)):
        weight = wide(weights[i]).flatten(1)
        if norm:
            level = [wide(t) for t in norm[4 * i : 4 * i + 4]]
            scale = scale_of(level, eps[i])
            weight = weight * scale[:, None]
            shifts.append((level[1] - level[2] * scale).expand(counts[i], -1))
        products.append(cells @ weight.t())
    reduced = torch.cat(products, 1)
    reduced = reduced + torch.cat(shifts) if norm else reduced
    return (reduced.relu() if relu else reduced).to(pooled.dtype)


# ---- upsampling ----------------------------------------------------------------------------------------------------


def _weights(
    index: Tensor, bins: Tensor, size: int, interpolation: int, kernel: int, dilation: int, dtype: torch.dtype
) -> Tensor:
    """(P, kernel, size): what cell number `index` of `bins` counts at each pixel, seen through each tap of a kernel.

    A tap sees the pixel (tap - kernel // 2) * dilation further on; beyond the map's border it sees zeros.
    """
    taps = (torch.arange(kernel, device=index.device) - kernel // 2) * dilation
    place = torch.arange(size, device=index.device) + taps[:, None]
    index, bins = index[:, None, None], bins[:, None, None].to(dtype)
    last = bins - 1
    if interpolation == NEAREST:
        near = torch.minimum((place * (bins / size)).floor(), last)
        weights = (near == index).to(dtype)
    else:
        if interpolation == 1:
            source = place * (last / torch.sym_max(size - 1, 1))
        else:
            source = torch.minimum(((place + 0.5) * (bins / size) - 0.5).clamp(min=0), last)
        weights = (1 - (source - index).abs()).clamp(min=0)
    return weights * ((place >= 0) & (place < size))


def _upsampling(
    bins: list[int],
    size: tuple[int, int],
    interpolation: int,
    kernel: list[int],
    dilation: list[int],
    like: Tensor,
) -> Tensor:
    """(P * kh * kw, H * W): what each cell counts at each pixel through each tap."""
    rows, columns = (
        _weights(*axis, size[i], interpolation, kernel[i], dilation[i], like.dtype)
        for i, axis in enumerate(_axes(bins, like))
    )
    return (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3).flatten(0, 2)


def _upsampled(reduced: Tensor, bins: list[int], size: tuple[int, int], align_corners: bool) -> list[Tensor]:
    """Every level of (N, P, R) at a size, (N, R, H, W) each."""
    cells = wide(reduced)
    weights = _upsampling(bins, size, int(align_corners), [1, 1], [1, 1], cells)
    counts = _counts(bins)
    products = zip(cells.transpose(1, 2).split(counts, 2), weights.split(counts), strict=True)
    return [(z @ w).to(reduced.dtype).unflatten(2, size) for z, w in products]


def pyramid_upsample_concat_(
    concat: Tensor, reduced: Tensor, offset: int, bins: list[int], align_corners: bool
) -> None:
    levels = torch.cat(_upsampled(reduced, bins, (concat.size(2), concat.size(3)), align_corners), 1)
    concat.narrow(1, offset, levels.size(1)).copy_(levels)


def pyramid_upsample_concat_backward(
    grad_concat: Tensor, offset: int, channels: int, bins: list[int], align_corners: bool
) -> Tensor:
    counts, size = _counts(bins), (grad_concat.size(2), grad_concat.size(3))
    grads = wide(grad_concat.narrow(1, offset, len(counts) * channels)).flatten(2).split(channels, 1)
    weights = _upsampling(bins, size, int(align_corners), [1, 1], [1, 1], grads[0]).split(counts)
    parts = [g @ w.t() for g, w in zip(grads, weights, strict=True)]
    return torch.cat(parts, 2).transpose(1, 2).to(grad_concat.dtype)


def _counts(bins: list[int]) -> list[int]:
    return [count_cells((level,)) for level in unflatten(bins)]


# ---- the context of a convolution ----------------------------------------------------------------------------------


def pyramid_context_(
    conv: Tensor,
    taps: Tensor,
    norm: list[Tensor],
    eps: float,
    relu: bool,
    bins: list[int],
    kernel_size: list[int],
    dilation: list[int],
    interpolation: int,
    accumulate: bool,
) -> None:
    o, size = conv.size(1), (conv.size(2), conv.size(3))
    values = wide(taps)
    if sum(_counts(bins)) <= FEW_CELLS:
        weights = _upsampling(bins, size, interpolation, kernel_size, dilation, values)
        parts = [(values.flatten(1, 2).transpose(1, 2) @ weights).unflatten(2, size)]
    else:
        parts = [
            _of_level(cells, level, size, kernel_size, dilation, interpolation)
            for cells, level in zip(values.split(_counts(bins), 1), unflatten(bins), strict=True)
        ]
    total = sum(parts, wide(conv)) if accumulate else sum(parts[1:], parts[0])
    if norm:
        scale = scale_of([wide(t) for t in norm], eps)
        total = total * scale.view(o, 1, 1) + (wide(norm[1]) - wide(norm[2]) * scale).view(o, 1, 1)
    conv.copy_(total.relu() if relu else total)


def _of_level(
    cells: Tensor,
    level: tuple[int, int],
    size: tuple[int, int],
    kernel: list[int],
    dilation: list[int],
    interpolation: int,
) -> Tensor:
    """What a level of many cells (N, h * w, kh * kw, O) adds, an axis at a time: (N, O, H, W)."""
    n, _, _, o = cells.shape
    if kernel == [1, 1]:
        mode, corners = ("nearest", None) if interpolation == NEAREST else ("bilinear", interpolation == 1)
        return F.interpolate(cells.reshape(n, *level, o).permute(0, 3, 1, 2), size, mode=mode, align_corners=corners)
    rows, columns = _level_weights(level, size, kernel, dilation, interpolation, cells)
    seen = cells.reshape(n, *level, *kernel, o).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return rows.t() @ (seen @ columns)


def _level_weights(
    level: tuple[int, int],
    size: tuple[int, int],
    kernel: list[int],
    dilation: list[int],
    interpolation: int,
    like: Tensor,
) -> list[Tensor]:
    """(h * kh, H) and (w * kw, W): _weights of all rows, and of all columns, of one level."""
    return [
        _weights(
            torch.arange(level[i], device=like.device),
            torch.full((1,), level[i], device=like.device),
            size[i],
            interpolation,
            kernel[i],
            dilation[i],
            like.dtype,
        ).flatten(0, 1)
        for i in range(2)
    ]


def pyramid_context_backward(
    grad_conv: Tensor, bins: list[int], kernel_size: list[int], dilation: list[int], interpolation: int
) -> Tensor:
    n, o, *size = grad_conv.shape
    grad = wide(grad_conv)
    if sum(_counts(bins)) <= FEW_CELLS:
        weights = _upsampling(bins, (size[0], size[1]), interpolation, kernel_size, dilation, grad)
        found = (grad.flatten(2) @ weights.t()).transpose(1, 2).unflatten(1, (-1, kernel_size[0] * kernel_size[1]))
        return found.to(grad_conv.dtype)
    parts = []
    for level in unflatten(bins):
        rows, columns = _level_weights(level, (size[0], size[1]), kernel_size, dilation, interpolation, grad)
        seen = rows @ (grad @ columns.t())
        seen = seen.view(n, o, level[0], kernel_size[0], level[1], kernel_size[1]).permute(0, 2, 4, 3, 5, 1)
        parts.append(seen.flatten(3, 4).flatten(1, 2))
    return torch.cat(parts, 1).to(grad_conv.dtype)


# ---- registration --------------------------------------------------------------------------------------------------

OPERATORS: dict[str, Any] = {
    function.__name__: function
    for function in (
        pyramid_pool,
        pyramid_pool_alone,
        pyramid_pool_backward,
        pyramid_reduce,
        pyramid_upsample_concat_,
        pyramid_upsample_concat_backward,
        pyramid_context_,
        pyramid_context_backward,
        # these pool and upsample nothing, or logits to a size far from it
        plain.new_concat,
        plain.pyramid_reduce_backward,
        plain.pyramid_batch_norm,
        plain.pyramid_batch_norm_backward,
        plain.pyramid_split_weight,
        plain.pyramid_split_weight_backward,
        plain.upsample_argmax,
        plain.upsample_softmax_accumulate_,
        plain.upsample_cross_entropy,
        plain.upsample_cross_entropy_backward,
        plain.confusion_matrix_,
    )
}
_TABLE: dict[Any, Any] = {getattr(torch.ops.pspnet_fast, name).default: f for name, f in OPERATORS.items()}
_TABLE[F.adaptive_avg_pool2d] = _adaptive_avg_pool2d


@functools.cache
def _warn(device: str) -> None:
    """Once."""
    warnings.warn(
        f"pspnet_fast has no kernels for {device} here: its operators run as torch's own operations, which take longer",
        stacklevel=3,
    )


def fallback(function: Any) -> Any:
    """What a device without kernels runs."""

    def run(*args: Any) -> Any:
        tensors = (a for a in args if isinstance(a, Tensor))
        _warn(next(tensors).device.type)
        return function(*args)

    return run


for _name, _function in OPERATORS.items():
    register_fallback(_name, fallback(_function))
