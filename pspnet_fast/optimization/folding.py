"""Runs convolution, batch norm, addition and ReLU of a frozen model as one operator, wherever its forward has them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fusion.lazy import METADATA, Lazy, values
from ..fusion.scope import Deferring
from ..ops._library import transforms_active
from .packed import Geometry, PackedConvolution

_DENSE = (Tensor, nn.Parameter)


class _Key(NamedTuple):
    """What tells one packed convolution from another: the identities of frozen tensors, and settings."""

    weight: int
    bias: int | None
    norm: tuple[int, ...]
    eps: float
    geometry: Geometry


class Folded(Lazy):
    """A convolution that is not computed yet, perhaps with the batch norm after it and a map added to it."""

    key: _Key

    @property
    def added(self) -> bool:
        """Whether a map is added to it."""
        return len(self._sources) > 1

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in METADATA and args[0].pending():
            return super().__torch_function__(function, types, args, kwargs)
        return function(*values(args, _computed), **values(kwargs or {}, _computed))


def _computed(lazy: Any) -> Any:
    return lazy.value() if isinstance(lazy, Folded) else lazy


class Packs:
    """The packed convolutions of a frozen model, made when first needed.

    Args:
        exact: by identity, each parameter and buffer of the model with what to fold: the tensor itself, or what it was
            rounded from.
        dtype: to compute in.
    """

    def __init__(self, exact: Mapping[int, Tensor], dtype: torch.dtype) -> None:
        self.exact, self.dtype = exact, dtype
        self._packs: dict[_Key, PackedConvolution] = {}

    def get(self, key: _Key) -> PackedConvolution:
        """The convolution of a key."""
        if key not in self._packs:
            bias = None if key.bias is None else self.exact[key.bias]
            norm: Any = (*(self.exact[i] for i in key.norm), key.eps) if key.norm else None
            self._packs[key] = PackedConvolution(self.exact[key.weight], bias, norm, key.geometry, self.dtype)
        return self._packs[key]

    def holds(self, *tensors: Any) -> bool:
        """Whether all of them are the model's, None allowed."""
        return all(t is None or id(t) in self.exact for t in tensors)


class Folding(Deferring):
    """The forward of a frozen model, without gradients."""

    def __init__(self, packs: Packs) -> None:
        super().__init__()
        self._packs = packs

    def _deferred(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        rule = _RULES.get(function)
        if rule is None or transforms_active():
            return NotImplemented
        parameters, apply = rule
        if len(args) > len(parameters) or not kwargs.keys() <= set(parameters):
            return NotImplemented
        return apply(self._packs, **dict(zip(parameters, args, strict=False)), **kwargs)


def _convolve(
    packs: Packs,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if isinstance(input, Folded):
        input = input.value()
    if weight is None or not packs.holds(weight, bias) or isinstance(padding, str):
        return NotImplemented
    if type(input) not in _DENSE or input.dim() != 4 or input.dtype != packs.dtype or input.device != weight.device:
        return NotImplemented
    if input.layout != torch.strided or (torch.is_grad_enabled() and input.requires_grad):
        return NotImplemented
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    if weight.dim() != 4 or input.size(1) != weight.size(1) * groups:
        return NotImplemented
    size = [
        (extent + 2 * p - d * (k - 1) - 1) // s + 1
        for extent, k, s, p, d in zip(input.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    ]
    if min(size) < 1 or torch.is_autocast_enabled(input.device.type):
        return NotImplemented
    key = _Key(id(weight), None if bias is None else id(bias), (), 0.0, geometry)
    return _convolved(packs, key, [input], (input.size(0), weight.size(0), *size))


def _batch_norm(
    packs: Packs,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    norm = weight, bias, running_mean, running_var
    if not _open(input) or input.added or input.key.norm or training or any(t is None for t in norm):
        return NotImplemented
    if not packs.holds(*norm) or any(t.shape != input.shape[1:2] for t in norm):
        return NotImplemented
    key = input.key._replace(norm=tuple(map(id, norm)), eps=eps)
    return _convolved(packs, key, input.sources(), input.shape)


def _add(packs: Packs, input: Any, other: Any) -> Any:
    pair = (input, other) if _open(input) and not input.added else (other, input)
    return _sum(packs, *pair)


def _sum(packs: Packs, first: Any, second: Any) -> Any:
    """A convolution and a map of its shape."""
    if not _open(first) or first.added or first is second:
        return NotImplemented
    map = second.value() if isinstance(second, Folded) else second
    if type(map) not in _DENSE or map.shape != first.shape or map.dtype != first.dtype or map.device != first.device:
        return NotImplemented
    return _convolved(packs, first.key, [*first.sources(), map], first.shape)


def _add_(packs: Packs, input: Any, other: Any) -> Any:
    """In place: whoever holds the convolution has the sum."""
    result = _sum(packs, input, other)
    if result is not NotImplemented:
        input._sources, input._compute, input._versions = result._sources, result._compute, result._versions
        return input
    return NotImplemented


def _relu(packs: Packs, input: Any, inplace: Any = False) -> Any:
    if not _open(input) or not isinstance(inplace, bool):
        return NotImplemented
    with torch._C.DisableTorchFunction():
        output = packs.get(input.key)(*input.sources(), relu=True)  # type: ignore[misc]
    if not inplace:
        return output
    input._value = output
    return input


def _relu_(packs: Packs, input: Any) -> Any:
    return _relu(packs, input, True)


def _open(map: Any) -> bool:
    return isinstance(map, Folded) and map.replaceable()


def _convolved(packs: Packs, key: _Key, sources: Sequence[Tensor], shape: Sequence[int]) -> Any:
    return Folded.make(lambda *maps: packs.get(key)(*maps), sources, shape, packs.dtype, key=key)


def _pair(value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return pair * 2 if len(pair) == 1 else pair


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_SUM = ("input", "other")
# function: its parameters and the rule
_RULES: dict[Any, tuple[Sequence[str], Any]] = {
    torch.conv2d: (_CONVOLUTION, _convolve),
    F.batch_norm: (_NORM, _batch_norm),
    **dict.fromkeys((torch.add, Tensor.add), (_SUM, _add)),
    Tensor.add_: (_SUM, _add_),
    F.relu: (("input", "inplace"), _relu),
    **dict.fromkeys((torch.relu, Tensor.relu), (("input",), _relu)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), (("input",), _relu_)),
}
