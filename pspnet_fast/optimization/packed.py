"""A convolution of frozen weights with the batch norm after it, packed for the kernels of one device."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import winograd

_LEAST_CHANNELS = 256  # from which on fewer products pay for the transforms (measured, docs/optimize.md)


class Geometry(NamedTuple):
    """The arguments of F.conv2d beside tensors, as pairs."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def affine(norm: Sequence[Any], bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A batch norm (weight, bias, mean, variance, eps) of a map with a bias as scale and shift, (C,) float64."""
    gamma, beta, mean, variance = (t.double() for t in norm[:4])
    scale = gamma / torch.sqrt(variance + norm[4])
    return scale, beta + ((0 if bias is None else bias.double()) - mean) * scale


class PackedConvolution:
    """F.conv2d, batch norm by its buffers, an addition and ReLU.

    Args:
        weight, bias: of the convolution; bias may be None.
        norm: weight, bias, mean, variance and eps; None for none. Folded into the convolution, in float64.
        geometry: of the convolution.
        dtype: to compute in.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        norm: tuple[Tensor, Tensor, Tensor, Tensor, float] | None,
        geometry: Geometry,
        dtype: torch.dtype,
    ) -> None:
        self._weight = weight
        self._scale: Tensor | None = None
        shift = None if bias is None else bias.double()
        if norm is not None:
            self._scale, shift = affine(norm, shift)
        self._bias = None if shift is None else shift.to(dtype)
        self.geometry, self.dtype = geometry, dtype
        # what each kernel takes, made when it first runs
        self._plain: Tensor | None = None
        self._reordered: Tensor | None = None
        self._transformed: Tensor | None = None
        self._onednn = has_onednn(weight.device, dtype)
        square, many = weight.shape[2:] == (winograd.TILE, winograd.TILE), min(weight.shape[:2]) >= _LEAST_CHANNELS
        keeps = geometry.stride == (1, 1) and geometry.padding == geometry.dilation
        phases = geometry.dilation[0] == geometry.dilation[1] and geometry.groups == 1
        on_cpu = dtype == torch.float32 and weight.device.type == "cpu"
        self._winograd = square and many and keeps and phases and on_cpu

    def __getstate__(self) -> dict[str, Any]:
        """Without what the kernels take: it is no tensor that could be copied, or is made again."""
        return self.__dict__ | dict.fromkeys(("_plain", "_reordered", "_transformed"))

    def _folded(self) -> Tensor:
        scaled = self._weight if self._scale is None else self._weight.double() * self._scale[:, None, None, None]
        return scaled.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def __call__(self, input: Tensor, other: Tensor | None = None, relu: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W'), channels-last; `other`, of that shape, is added before the ReLU."""
        input = input.contiguous(memory_format=torch.channels_last)
        dilation = self.geometry.dilation
        if self._winograd and len(input) and winograd.has_fewer_products((input.size(2), input.size(3)), dilation):
            if self._transformed is None:
                self._transformed = winograd.transformed_weight(self._folded())
            output = winograd.convolve(input, self._transformed, dilation[0])
            if self._bias is not None:
                output += self._bias[:, None, None]
        elif self._onednn and input.numel():
            return self._by_onednn(input, other, relu)
        else:
            if self._plain is None:
                self._plain = self._folded()
            output = F.conv2d(input, self._plain, self._bias, *self.geometry)
        if other is not None:
            output += other
        return output.relu_() if relu else output

    def _by_onednn(self, input: Tensor, other: Tensor | None, relu: bool) -> Tensor:
        """By the operators that inductor takes for frozen weights."""
        stride, padding, dilation, groups = self.geometry
        if self._reordered is None:
            reorder: Any = torch.ops.mkldnn._reorder_convolution_weight
            self._reordered = reorder(self._folded(), padding, stride, dilation, groups, input.shape)
        arguments = self._reordered, self._bias, padding, stride, dilation, groups
        if other is None:
            unary = torch.ops.mkldnn._convolution_pointwise.default
            return unary(input, *arguments, "relu" if relu else "none", [], "")
        binary = torch.ops.mkldnn._convolution_pointwise.binary
        return binary(input, other, *arguments, "add", 1.0, "relu" if relu else None, [], "")


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolutions with what follows them run here: tried, for they are no public interface."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.enabled:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return _works(dtype)


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    input, weight = (torch.ones(1, 2, 1, 1, dtype=dtype) for _ in range(2))
    try:
        reordered = torch.ops.mkldnn._reorder_convolution_weight(weight, [0, 0], [1, 1], [1, 1], 1, [1, 2, 1, 1])
        rest = reordered, weight.new_ones(1), [0, 0], [1, 1], [1, 1], 1
        unary = torch.ops.mkldnn._convolution_pointwise.default(input, *rest, "relu", [], "")
        other = -2 * torch.ones_like(unary)
        binary = torch.ops.mkldnn._convolution_pointwise.binary(input, other, *rest, "add", 1.0, "relu", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool(unary.item() == 3 and binary.item() == 1)
