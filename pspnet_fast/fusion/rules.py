"""The functions of torch that need not compute a lazy map, and what they do in its place, exactly.

Upsampling a map, concatenation of such along channels, and F.linear of tokens on their way to be such a map give lazy
ones; a convolution takes what they are made of (convolution.py), and in inference batch norm and ReLU run with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..head import conv_dtype
from ..ops._library import transforms_active
from ..ops.checks import DTYPES, MAX_BINS, MAX_DILATION
from ..split_weight import why_not_split
from .convolution import Convolution, interpolate
from .lazy import Concat, Convolved, Lazy, Part, Projected, Upsampling


def rewrite(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a function of torch without computing its lazy arguments; NotImplemented where it needs them."""
    rule = _RULES.get(function)
    if rule is None or transforms_active():
        return NotImplemented
    parameters, apply = rule
    if parameters is None:
        return NotImplemented if kwargs else apply(function, *args)
    if len(args) > len(parameters) or not kwargs.keys() <= set(parameters):
        return NotImplemented
    return apply(**dict(zip(parameters, args, strict=False)), **kwargs)


# ---- upsampling and concatenation ----------------------------------------------------------------------------------


def _upsample(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    projected = isinstance(input, Concat) and input.replaceable() and [p.upsampling for p in input.parts] == [None]
    if mode not in ("bilinear", "nearest") or antialias or (mode == "nearest" and align_corners is not None):
        return NotImplemented
    if isinstance(input, Lazy) and not projected:
        input = input.value()
    if not (projected or is_map(input)):
        return NotImplemented
    n, c, h, w = input.shape
    pair = _target((h, w), size, scale_factor)
    copied = projected and (h, w) == pair
    if pair is None or max(h, w) > MAX_BINS or (h * w >= pair[0] * pair[1] and not copied):
        return NotImplemented
    upsampling = Upsampling("bilinear", bool(align_corners)) if mode == "bilinear" else Upsampling("nearest")
    if not upsampling.exact((h, w), pair):
        return NotImplemented
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type):  # which may have a dtype of its own for this function
        dtype = interpolate(torch.empty(1, 1, 1, 1, dtype=dtype, device=input.device), (1, 1), upsampling).dtype
    sources, compute, part = (input,), _itself, Part(c)
    if projected:
        sources, compute, part = input.sources(), input._compute, input.parts[0]
    if copied and dtype != input.dtype:
        return NotImplemented
    if copied:
        return Concat.make(compute, sources, input.shape, dtype, parts=(part,))
    return Concat.make(
        lambda *sources: interpolate(compute(*sources), pair, upsampling),
        sources,
        (n, c, *pair),
        dtype,
        parts=(part._replace(upsampling=upsampling),),
    )


def _target(size: tuple[int, int], target: Any, scale: Any) -> tuple[int, int] | None:
    """The (height, width) that F.interpolate gives, where it is certain and its scale is that of the sizes."""
    if target is None:
        scales = (scale, scale) if isinstance(scale, (int, float)) else scale
        if not isinstance(scales, (list, tuple)) or len(scales) != 2:
            return None
        target = [s * float(factor) for s, factor in zip(size, scales, strict=True)]
        if any(t != int(t) for t in target):
            return None
        target = [int(t) for t in target]
    pair = (target, target) if isinstance(target, int) else tuple(target) if isinstance(target, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        return None
    return pair[0], pair[1]


def _concatenate(tensors: Any, dim: Any = 0) -> Any:
    if dim not in (1, -3) or not isinstance(tensors, (list, tuple)):
        return NotImplemented
    sources: list[Tensor] = []
    parts: list[Part] = []
    computes: list[tuple[Callable[..., Tensor], int]] = []
    for tensor in tensors:
        if isinstance(tensor, Concat) and tensor.replaceable():
            given = tensor.sources()
            parts += tensor.parts
            computes.append((tensor._compute, len(given)))
            sources += given
        else:
            map = tensor.value() if isinstance(tensor, Lazy) else tensor
            if not is_map(map):
                return NotImplemented
            sources.append(map)
            parts.append(Part(map.size(1)))
            computes.append((_itself, 1))
    if all(part.projection is None and part.upsampling is None for part in parts):
        return NotImplemented
    n, _, *size = tensors[0].shape
    if any(t.dim() != 4 or [t.size(0), *t.shape[2:]] != [n, *size] or t.device != tensors[0].device for t in tensors):
        return NotImplemented
    dtype = tensors[0].dtype
    for part in tensors:
        dtype = torch.promote_types(dtype, part.dtype)

    def concatenate(*sources: Tensor) -> Tensor:
        rest = iter(sources)
        return torch.cat([compute(*(next(rest) for _ in range(count))) for compute, count in computes], 1)

    shape = (n, sum(part.channels for part in parts), *size)
    return Concat.make(concatenate, sources, shape, dtype, parts=tuple(parts))


def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    """By nothing, as U-Nets do where a map's size has halves."""
    if not isinstance(input, Concat) or not input.replaceable() or mode != "constant" or any(pad):
        return NotImplemented
    return Concat.make(input._compute, input.sources(), input.shape, input.dtype, parts=input.parts)


def _itself(source: Tensor) -> Tensor:
    return source


# ---- tokens on their way to a map ----------------------------------------------------------------------------------


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """F.linear that makes no fewer channels than it takes: what SegFormer's heads upsample."""
    given = [input, weight] if bias is None else [input, weight, bias]
    if any(type(t) not in _DENSE or t.dtype not in DTYPES or t.device != input.device for t in given):
        return NotImplemented
    if input.dim() != 3 or weight.dim() != 2 or not 0 < input.size(2) == weight.size(1) <= weight.size(0):
        return NotImplemented
    dtype = conv_dtype(input)
    if any(conv_dtype(t) != dtype for t in given) or input.numel() == 0:
        return NotImplemented
    return Projected.make(F.linear, given, (*input.shape[:2], weight.size(0)), dtype, transposed=False)


def _transpose(function: Any, input: Any, *dims: Any) -> Any:
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    swaps = (
        {(0, 2, 1), (0, -1, 1), (0, -1, -2)} if function in _PERMUTE else {(1, 2), (2, 1), (-1, -2), (-2, -1), (1, -1)}
    )
    if not isinstance(input, Projected) or not input.replaceable() or dims not in swaps:
        return NotImplemented
    n, a, b = input.shape
    return Projected.make(
        lambda *sources: input._compute(*sources).transpose(1, 2),
        input.sources(),
        (n, b, a),
        input.dtype,
        transposed=not input.transposed,
    )


def _reshape(function: Any, input: Any, *shape: Any) -> Any:
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
    if not isinstance(input, Projected) or not input.replaceable() or not input.transposed or len(shape) != 4:
        return NotImplemented
    n, d, tokens = input.shape
    known = [s for s in shape if s != -1]
    if any(not isinstance(s, int) for s in shape) or len(known) < 3 or min(known) < 1:
        return NotImplemented
    rest = 1
    for s in known:
        rest *= s
    full = [n * d * tokens // rest if s == -1 else s for s in shape]
    if full[:2] != [n, d] or full[2] * full[3] != tokens:
        return NotImplemented
    part = Part(d, len(input._sources), (full[2], full[3]))
    compute = input._compute
    return Concat.make(
        lambda *sources: function(compute(*sources), full), input.sources(), full, input.dtype, parts=(part,)
    )


# ---- convolution and what follows it -------------------------------------------------------------------------------


def _convolve(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    if not isinstance(input, Concat) or not input.replaceable() or type(weight) not in _DENSE:
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
    size = (input.size(2), input.size(3))
    convolution = Convolution.of(input.by_part(), tuple(weight.shape), size, dilation, dtype)
    if convolution is None:
        return NotImplemented
    tensors = [*input.sources(), weight] if bias is None else [*input.sources(), weight, bias]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return convolution(*tensors)
    shape = (input.size(0), weight.size(0), *size)
    return Convolved.make(convolution, tensors, shape, dtype, convolution=convolution)


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    norm = [weight, bias, running_mean, running_var]
    if not isinstance(input, Convolved) or not input.replaceable() or training or input.convolution.eps is not None:
        return NotImplemented
    if any(type(t) not in _DENSE or t.shape != input.shape[1:2] or t.device != input.device for t in norm):
        return NotImplemented
    if any(t.dtype not in (torch.float32, input.dtype) or t.dtype != weight.dtype for t in norm):
        return NotImplemented
    if torch.is_grad_enabled() and any(t.requires_grad for t in norm):
        return NotImplemented
    convolution = input.convolution.followed_by(eps)
    return Convolved.make(convolution, [*input.sources(), *norm], input.shape, input.dtype, convolution=convolution)


def _relu(input: Any, inplace: bool = False) -> Any:
    if not isinstance(input, Convolved) or not input.replaceable() or not isinstance(inplace, bool):
        return NotImplemented
    with torch._C.DisableTorchFunction(), input._state.restored():
        output = input.convolution(*input.sources(), relu=True)
    if not inplace:
        return output
    input._value = output
    return input


_DENSE = (Tensor, nn.Parameter, FakeTensor)  # the last is what torch.export runs a model on


def is_map(tensor: Any) -> bool:
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


_PERMUTE = (Tensor.permute, torch.permute)
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_INTERPOLATE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
# function: (its parameters, the rule), or (None, the rule that takes the function and its arguments)
_RULES: dict[Any, tuple[Sequence[str] | None, Callable[..., Any]]] = {
    F.interpolate: (_INTERPOLATE, _upsample),
    torch.cat: (("tensors", "dim"), _concatenate),
    torch.concat: (("tensors", "dim"), _concatenate),
    F.pad: (("input", "pad", "mode", "value"), _pad),
    F.linear: (("input", "weight", "bias"), _linear),
    **dict.fromkeys((*_PERMUTE, Tensor.transpose, torch.transpose), (None, _transpose)),
    **dict.fromkeys((Tensor.reshape, torch.reshape, Tensor.view), (None, _reshape)),
    torch.conv2d: (_CONVOLUTION, _convolve),
    F.batch_norm: (_NORM, _batch_norm),
    F.relu: (("input", "inplace"), _relu),
}
