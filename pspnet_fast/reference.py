"""The operators in plain PyTorch, with the signatures of pspnet_fast.ops: the specification, in float64 the truth.

Differentiable by autograd, for any device and dtype. Slower by design: each level is pooled, reduced and upsampled on
its own, as the paper's code does it (Zhao et al., CVPR 2017, section 3.2).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.checks import Bins, Mode, Norm, Reduction, as_levels, as_window


def pyramid_pool(input: Tensor, bins: Bins, *, concat: Tensor | None = None, offset: int = 0) -> Tensor:
    """Reference of ops.pyramid_pool: (N, C, H, W) -> (N, P, C)."""
    if concat is not None:
        concat[:, offset : offset + input.size(1)] = input
    pooled = [F.adaptive_avg_pool2d(input, level).flatten(2) for level in as_levels(bins)]
    return torch.cat(pooled, 2).transpose(1, 2)


def pyramid_reduce(
    pooled: Tensor, weights: Sequence[Tensor], bins: Bins, *, norm: Sequence[Norm] | None = None, relu: bool = False
) -> Tensor:
    """Reference of ops.pyramid_reduce: (N, P, C) -> (N, P, R)."""
    levels = as_levels(bins)
    reduced = []
    for i, cells in enumerate(pooled.split([h * w for h, w in levels], 1)):
        z = F.linear(cells, weights[i].flatten(1))
        if norm is not None:
            z = _normalize(z.transpose(1, 2), norm[i]).transpose(1, 2)
        reduced.append(F.relu(z) if relu else z)
    return torch.cat(reduced, 1)


def pyramid_upsample_concat_(
    concat: Tensor, reduced: Tensor, bins: Bins, *, offset: int, align_corners: bool = True
) -> Tensor:
    """Reference of ops.pyramid_upsample_concat_: writes (N, P, R), upsampled, into concat (N, K, H, W)."""
    levels = upsample_levels(reduced, bins, (concat.size(2), concat.size(3)), align_corners)
    concat[:, offset : offset + levels.size(1)] = levels
    return concat


def upsample_levels(reduced: Tensor, bins: Bins, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Every level of (N, P, R) at a size: (N, L * R, H, W)."""
    levels = as_levels(bins)
    n, _, r = reduced.shape
    parts = zip(reduced.split([h * w for h, w in levels], 1), levels, strict=True)
    maps = [cells.transpose(1, 2).reshape(n, r, *level) for cells, level in parts]
    return torch.cat([F.interpolate(z, size, mode="bilinear", align_corners=align_corners) for z in maps], 1)


def pyramid_context_(
    conv: Tensor,
    taps: Tensor,
    bins: Bins,
    kernel_size: int | tuple[int, int],
    *,
    dilation: int | tuple[int, int] = 1,
    mode: Mode = "bilinear",
    align_corners: bool = True,
    norm: Norm | None = None,
    relu: bool = False,
    accumulate: bool = True,
) -> Tensor:
    """Reference of ops.pyramid_context_: adds (N, P, kh * kw, O), upsampled and shifted tap by tap, to (N, O, H, W)."""
    levels = as_levels(bins)
    (kh, kw), (dh, dw) = as_window(kernel_size, dilation, levels)
    n, o, h, w = conv.shape
    total = conv if accumulate else torch.zeros_like(conv)
    corners = None if mode == "nearest" else align_corners
    for cells, level in zip(taps.split([h * w for h, w in levels], 1), levels, strict=True):
        seen = cells.permute(0, 2, 3, 1).reshape(n, kh * kw * o, *level)
        seen = F.interpolate(seen, (h, w), mode=mode, align_corners=corners)
        seen = F.pad(seen, (kw // 2 * dw, kw // 2 * dw, kh // 2 * dh, kh // 2 * dh)).unflatten(1, (kh * kw, o))
        for tap in range(kh * kw):
            top, left = tap // kw * dh, tap % kw * dw
            total = total + seen[:, tap, :, top : top + h, left : left + w]
    if norm is not None:
        total = _normalize(total, norm)
    return conv.copy_(total.relu() if relu else total)


def upsample_argmax(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool, return_confidence: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of ops.upsample_argmax: (N, K, h, w) -> (N, H, W)."""
    values = _upsample(logits, size, align_corners)
    classes = values.argmax(1).to(torch.uint8 if logits.size(1) <= 256 else torch.int32)
    return (classes, values.softmax(1).amax(1)) if return_confidence else classes


def upsample_softmax_accumulate_(
    probabilities: Tensor,
    logits: Tensor,
    *,
    align_corners: bool,
    top: int = 0,
    left: int = 0,
    size: tuple[int, int] | None = None,
    mirrored: bool = False,
    weight: float = 1.0,
) -> Tensor:
    """Reference of ops.upsample_softmax_accumulate_: adds (N, K, h, w) to a window of (N, K, H, W)."""
    height, width = size or (probabilities.size(2) - top, probabilities.size(3) - left)
    p = _upsample(logits, (height, width), align_corners).softmax(1)
    rows, columns = slice(top, top + height), slice(left, left + width)
    p = probabilities[:, :, rows, columns] + weight * (p.flip(3) if mirrored else p)
    probabilities[:, :, rows, columns] = p
    return probabilities


def confusion_matrix(
    prediction: Tensor, target: Tensor, K: int, ignore_index: int = 255, out: Tensor | None = None
) -> Tensor:
    """Reference of ops.confusion_matrix: counts (K, K)."""
    counted = target != ignore_index
    cells = target[counted].long() * K + prediction[counted].long()
    counts = torch.bincount(cells, minlength=K * K).view(K, K)
    return counts if out is None else out.add_(counts)


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
    """Reference of ops.upsample_cross_entropy: logits (N, K, h, w), target (N, H, W) -> a number, or (N, H, W)."""
    upsampled = _upsample(logits, size or target.shape[1:], align_corners)
    weight = None if weight is None else weight.to(upsampled.dtype)
    loss = F.cross_entropy(
        upsampled,
        target.long(),
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum" if reduction == "mean" else reduction,
    )
    if reduction != "mean":
        return loss
    total = total_weight(target, weight, ignore_index)
    return torch.where(total == 0, 0, loss / torch.where(total == 0, 1, total))


def total_weight(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The sum of the targets' weights, by which the mean divides."""
    counts = target != ignore_index
    return (counts if weight is None else weight[target.long() * counts] * counts).sum()


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


def _normalize(z: Tensor, norm: Norm) -> Tensor:
    """F.batch_norm with running statistics, (N, C, ...), but differentiable by these as well."""
    weight, bias, mean, var = (wide(t).view(-1, *[1] * (z.dim() - 2)) for t in norm[:4])
    return ((wide(z) - mean) * (weight / (var + norm[4]).sqrt()) + bias).to(z.dtype)


def _upsample(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(wide(logits), size, mode="bilinear", align_corners=align_corners)
