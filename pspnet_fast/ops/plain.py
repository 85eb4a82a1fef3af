"""The compiled operators, backward included, as operations of torch, with the same arguments.

They run where torch has to see through an operator: forward-mode AD, the transforms of torch.func and derivatives of
derivatives (see _library.register_derivatives). Those of the forward operators are the references.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .checks import NEAREST, REDUCTIONS, count_cells, is_channels_last, unflatten

_pool_backward = torch.ops.aten._adaptive_avg_pool2d_backward.default
_upsample_backward = torch.ops.aten.upsample_bilinear2d_backward.default
_nearest_backward = torch.ops.aten.upsample_nearest2d_backward.default


def new_concat(input: Tensor, channels: int) -> Tensor:
    n, _, h, w = input.shape
    last = is_channels_last(input)
    strides = (h * w * channels, 1, w * channels, channels) if last else (h * w * channels, h * w, w, 1)
    return input.new_empty_strided((n, channels, h, w), strides)  # of a batch of maps, it is a batch of concatenations


def pyramid_pool(input: Tensor, concat: Tensor | None, offset: int, bins: list[int]) -> Tensor:
    return reference.pyramid_pool(input, unflatten(bins), concat=concat, offset=offset)


def pyramid_pool_alone(input: Tensor, bins: list[int]) -> Tensor:
    return reference.pyramid_pool(input, unflatten(bins))


def pyramid_pool_backward(
    grad_pooled: Tensor,
    grad_concat: Tensor | None,
    offset: int,
    bins: list[int],
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    n, _, c = grad_pooled.shape
    map = grad_pooled.new_empty(n, c, height, width)  # its shape counts
    grad = grad_pooled.new_zeros(n, c, height, width) if grad_concat is None else grad_concat.narrow(1, offset, c)
    for part, level in _levels(grad_pooled, bins):
        grad = grad + _pool_backward(part.transpose(1, 2).reshape(n, c, *level), map)
    return grad


def pyramid_reduce(
    pooled: Tensor, weights: list[Tensor], norm: list[Tensor], eps: list[float], relu: bool, bins: list[int]
) -> Tensor:
    levels: Any = [(*norm[4 * i : 4 * i + 4], e) for i, e in enumerate(eps)] or None
    # .to: within torch.func, autocast cannot be left, see _library
    return reference.pyramid_reduce(pooled, weights, unflatten(bins), norm=levels, relu=relu).to(pooled.dtype)


def pyramid_reduce_backward(
    grad_reduced: Tensor, pooled: Tensor, weights: list[Tensor], bins: list[int]
) -> tuple[Tensor, Tensor]:
    c, r = pooled.size(2), grad_reduced.size(2)
    grads = [grad for grad, _ in _levels(grad_reduced, bins)]
    cells = [part for part, _ in _levels(pooled, bins)]
    # reshape, not flatten: is_grads_batched=True knows that
    grad_pooled = [grad @ weight.reshape(r, c) for grad, weight in zip(grads, weights, strict=True)]
    grad_weights = [g.reshape(-1, r).t() @ z.reshape(-1, c) for g, z in zip(grads, cells, strict=True)]
    return torch.cat(grad_pooled, 1).to(pooled.dtype), torch.stack(grad_weights).to(pooled.dtype)


def pyramid_upsample_concat_(
    concat: Tensor, reduced: Tensor, offset: int, bins: list[int], align_corners: bool
) -> None:
    reference.pyramid_upsample_concat_(concat, reduced, unflatten(bins), offset=offset, align_corners=align_corners)


def pyramid_upsample_concat_backward(
    grad_concat: Tensor, offset: int, channels: int, bins: list[int], align_corners: bool
) -> Tensor:
    n, _, h, w = grad_concat.shape
    levels = unflatten(bins)
    grads = grad_concat.narrow(1, offset, len(levels) * channels).split(channels, 1)
    sizes = [(n, channels, *level) for level in levels]
    parts = [_upsample_backward(g, (h, w), size, align_corners) for g, size in zip(grads, sizes, strict=True)]
    return torch.cat([part.flatten(2) for part in parts], 2).transpose(1, 2)


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
    reference.pyramid_context_(
        conv,
        taps,
        unflatten(bins),
        (kernel_size[0], kernel_size[1]),
        dilation=(dilation[0], dilation[1]),
        mode="nearest" if interpolation == NEAREST else "bilinear",
        align_corners=interpolation == 1,
        norm=(norm[0], norm[1], norm[2], norm[3], eps) if norm else None,
        relu=relu,
        accumulate=accumulate,
    )


def pyramid_context_backward(
    grad_conv: Tensor, bins: list[int], kernel_size: list[int], dilation: list[int], interpolation: int
) -> Tensor:
    n, o, h, w = grad_conv.shape
    (kh, kw), (dh, dw) = kernel_size, dilation
    padded = F.pad(grad_conv, (kw // 2 * dw, kw // 2 * dw, kh // 2 * dh, kh // 2 * dh))
    shifts = [((kh - 1 - u) * dh, (kw - 1 - v) * dw) for u in range(kh) for v in range(kw)]  # the other way round
    seen = torch.cat([padded[:, :, top : top + h, left : left + w] for top, left in shifts], 1)
    shape = (n, kh * kw * o)
    sizes = [(*shape, *level) for level in unflatten(bins)]
    if interpolation == NEAREST:
        cells = [_nearest_backward(seen, (h, w), size) for size in sizes]
    else:
        cells = [_upsample_backward(seen, (h, w), size, interpolation == 1) for size in sizes]
    return torch.cat([level.flatten(2) for level in cells], 2).unflatten(1, (kh * kw, o)).permute(0, 3, 1, 2)


def upsample_argmax(
    logits: Tensor, height: int, width: int, align_corners: bool, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    result: Any = reference.upsample_argmax(
        logits, (height, width), align_corners=align_corners, return_confidence=return_confidence
    )
    return result if return_confidence else (result, reference.wide(logits).new_empty(0))


def upsample_softmax_accumulate_(
    probabilities: Tensor,
    logits: Tensor,
    top: int,
    left: int,
    height: int,
    width: int,
    align_corners: bool,
    mirrored: bool,
    weight: float,
) -> None:
    reference.upsample_softmax_accumulate_(
        probabilities,
        logits,
        align_corners=align_corners,
        top=top,
        left=left,
        size=(height, width),
        mirrored=mirrored,
        weight=weight,
    )


def confusion_matrix_(counts: Tensor, prediction: Tensor, target: Tensor, ignore_index: int) -> None:
    k = counts.size(0)
    prediction, target = prediction.flatten().long(), target.flatten().long()
    counted = (target != ignore_index) & (target >= 0) & (target < k) & (prediction >= 0) & (prediction < k)
    cells = torch.where(counted, target * k + prediction, 0)  # a fixed number of them, as vmap needs it
    counts += cells.new_zeros(k * k).scatter_add(0, cells, counted.long()).view(k, k)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = reference.upsample_cross_entropy(
        logits, target, None, align_corners, weight, ignore_index, label_smoothing, REDUCTIONS[reduction]
    )
    values = reference.wide(logits).detach()
    lse = F.interpolate(values, target.shape[1:], mode="bilinear", align_corners=align_corners).logsumexp(1)
    return loss, lse, reference.total_weight(target, weight, ignore_index).to(loss.dtype)


def upsample_cross_entropy_backward(
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
    size = target.shape[1:]
    values = F.interpolate(reference.wide(logits), size, mode="bilinear", align_corners=align_corners)
    counted = (target != ignore_index)[:, None]
    classes = target.long()[:, None] * counted
    # the loss of a pixel is the sum over classes k of expected_k (lse - values_k)
    expected = torch.zeros_like(values).scatter(1, classes, 1 - label_smoothing) + label_smoothing / values.size(1)
    if weight is not None:
        expected = expected * weight.to(values.dtype)[:, None, None]
    grad = grad_loss[:, None] if REDUCTIONS[reduction] == "none" else grad_loss
    if REDUCTIONS[reduction] == "mean":
        grad = torch.where(total_weight == 0, 0, grad / torch.where(total_weight == 0, 1, total_weight))
    grad = grad * (values.softmax(1) * expected.sum(1, keepdim=True) - expected)
    grad = torch.where(counted, grad, 0)
    return _upsample_backward(grad, size, logits.shape, align_corners).to(logits.dtype)


def _levels(cells: Tensor, bins: list[int]) -> Any:
    """(the cells of a level, (bins_h, bins_w)) for each level of (N, P, ...)."""
    levels = unflatten(bins)
    return zip(cells.split([count_cells((level,)) for level in levels], 1), levels, strict=True)
