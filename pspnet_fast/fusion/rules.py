"""The functions of torch that need not compute a lazy map, and what they do in its place, exactly.

Upsampling a small map gives an Upsampled, concatenation of such along channels a Concat, and a convolution of either is
computed as FusedPSPHead does it (its docstring has the formula): the convolution of the dense maps, and the products of
the small ones with their part of the weight, interpolated (ops.pyramid_context_).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..head import conv_dtype
from ..ops._library import transforms_active
from ..ops.checks import DTYPES, MAX_DILATION, MAX_LEVELS, MAX_SEEN
from ..split_weight import split_product, why_not_split
from .lazy import Concat, Lazy, Upsampled

MOST_CELLS = 1024  # of the maps that one convolution takes: pyramid_context_ is made for few
LEAST_ELEMENTS = 1 << 14  # of upsampled maps; for both bounds see head.concatenation_is_cheaper


def rewrite(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a function of torch without computing its lazy arguments; NotImplemented where it needs them."""
    rule = _RULES.get(function)
    if rule is None or transforms_active():
        return NotImplemented
    parameters, apply = rule
    if len(args) > len(parameters) or not kwargs.keys() <= set(parameters):
        return NotImplemented
    return apply(**dict(zip(parameters, args, strict=False)), **kwargs)


def _upsample(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    if mode != "bilinear" or scale_factor is not None or antialias or not _is_map(input):
        return NotImplemented
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        return NotImplemented
    cells, pixels = input.size(2) * input.size(3), pair[0] * pair[1]
    if cells > MOST_CELLS or cells >= pixels:
        return NotImplemented
    size, align_corners = (*input.shape[:2], *pair), bool(align_corners)
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type):  # which may have a dtype of its own for this function
        dtype = _interpolate(input.new_empty(1, 1, 1, 1), (1, 1), align_corners).dtype
    return Upsampled.make(
        lambda source: _interpolate(source, pair, align_corners), (input,), size, dtype, align_corners=align_corners
    )


def _concatenate(tensors: Any, dim: Any = 0) -> Any:
    if dim not in (1, -3) or not isinstance(tensors, (list, tuple)):
        return NotImplemented
    sources: list[Tensor] = []
    corners: list[bool | None] = []
    for part in tensors:
        if isinstance(part, Lazy) and part.replaceable():
            sources += part.sources()
            corners += part.align_corners if isinstance(part, Concat) else [part.align_corners]  # type: ignore[attr-defined]
        else:
            sources.append(part.value() if isinstance(part, Lazy) else part)
            corners.append(None)
    n, _, *size = tensors[0].shape
    maps = [s for s, c in zip(sources, corners, strict=True) if c is None]
    if len(maps) == len(sources) or not all(map(_is_map, maps)):
        return NotImplemented
    if any(t.dim() != 4 or [t.size(0), *t.shape[2:]] != [n, *size] or t.device != tensors[0].device for t in tensors):
        return NotImplemented
    dtype = tensors[0].dtype
    for part in tensors:
        dtype = torch.promote_types(dtype, part.dtype)

    def concatenate(*sources: Tensor) -> Tensor:
        given = zip(sources, corners, strict=True)
        return torch.cat([s if c is None else _interpolate(s, size, c) for s, c in given], 1)

    shape = (n, sum(t.size(1) for t in tensors), *size)
    return Concat.make(concatenate, sources, shape, dtype, align_corners=tuple(corners))


def _convolve(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    if not isinstance(input, (Upsampled, Concat)) or not input.replaceable() or type(weight) not in _DENSE:
        return NotImplemented
    kernel, dilation = weight.shape[2:], _pair(dilation)
    padding = padding if isinstance(padding, str) else _pair(padding)
    if weight.size(1) != input.size(1) or why_not_split(kernel, _pair(stride), padding, dilation, groups):
        return NotImplemented
    if not all(1 <= d <= MAX_DILATION for d in dilation):
        return NotImplemented
    dtype = conv_dtype(input)
    cast = torch.is_autocast_enabled(input.device.type)
    if weight.device != input.device or dtype not in DTYPES or not (cast or weight.dtype == input.dtype):
        return NotImplemented
    sources = input.sources()
    corners = input.align_corners if isinstance(input, Concat) else (input.align_corners,)
    if not _is_worth_it(sources, corners, kernel, input.size(2) * input.size(3)):
        return NotImplemented
    return _split_convolution(sources, corners, weight, bias, (input.size(2), input.size(3)), dilation, dtype)


def _is_worth_it(sources: Sequence[Tensor], corners: Sequence[bool | None], kernel: Sequence[int], pixels: int) -> bool:
    """Whether the products with the cells cost less than a convolution of the upsampled maps, and can be added up."""
    levels = [s for s, c in zip(sources, corners, strict=True) if c is not None]
    cells = sum(z.size(2) * z.size(3) for z in levels)
    if cells > min(pixels, MOST_CELLS) or sum(z.size(1) for z in levels) * pixels < LEAST_ELEMENTS:
        return False
    return len(levels) <= MAX_LEVELS and all(
        k * sum(z.size(2 + a) for z in levels) <= MAX_SEEN for a, k in enumerate(kernel)
    )


def _split_convolution(
    sources: Sequence[Tensor],
    corners: Sequence[bool | None],
    weight: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """F.conv2d of the concatenation of maps (corners None) and upsampled sources, keeping the size."""
    starts = [0]
    for source in sources:
        starts.append(starts[-1] + source.size(1))
    channels = [(start, source.size(1)) for start, source in zip(starts, sources, strict=False)]
    dense = [i for i, c in enumerate(corners) if c is None]
    # levels of one convention lie together: the operator takes one for all
    levels = sorted((i for i, c in enumerate(corners) if c is not None), key=lambda i: bool(corners[i]))
    cells = [sources[i].to(dtype).permute(0, 2, 3, 1).flatten(1, 2) for i in levels]
    first, taps = split_product(weight, [channels[i] for i in dense], [channels[i] for i in levels], cells)
    n, o, kernel = sources[0].size(0), weight.size(0), (weight.size(2), weight.size(3))
    if first is None:
        output = (
            taps.new_zeros(n, o, *size) if bias is None else bias.to(dtype)[:, None, None].expand(n, o, *size).clone()
        )
    else:
        maps = [sources[i] for i in dense]
        padding = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
        output = F.conv2d(maps[0] if len(maps) == 1 else torch.cat(maps, 1), first, bias, 1, padding, dilation)
    at = 0
    for align_corners in (False, True):
        bins = [(sources[i].size(2), sources[i].size(3)) for i in levels if corners[i] == align_corners]
        if bins:
            count = sum(h * w for h, w in bins)
            part = taps.narrow(1, at, count)
            output = ops.pyramid_context_(output, part, bins, kernel, dilation=dilation, align_corners=align_corners)
            at += count
    return output


def _interpolate(source: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(source, tuple(size), mode="bilinear", align_corners=align_corners)


_DENSE = (Tensor, nn.Parameter)


def _is_map(tensor: Any) -> bool:
    """Whether a tensor is a map (N, C, H, W) of a kind that the operators take."""
    return (
        type(tensor) in _DENSE
        and tensor.dim() == 4
        and min(tensor.shape[1:]) > 0
        and tensor.dtype in DTYPES
        and tensor.device.type in ("cpu", "cuda")
        and tensor.layout == torch.strided
    )


def _pair(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_RULES: dict[Any, tuple[Sequence[str], Callable[..., Any]]] = {
    F.interpolate: (
        ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
        _upsample,
    ),
    torch.cat: (("tensors", "dim"), _concatenate),
    torch.concat: (("tensors", "dim"), _concatenate),
    torch.conv2d: (_CONVOLUTION, _convolve),
}
