"""A convolution of maps that are upsampled, or projected from tokens, from what they are made of.

A convolution of a concatenation is the sum of those of its parts. That of an upsampled map is the interpolation of the
map's products with the weights of every tap (ops.pyramid_context_ has the formula), whatever the map's size. And where
F.linear stands before a 1x1 convolution with nothing but upsampling between them, both are one linear map:
F (L x + b) = (F L) x + F b, and upsampling leaves a constant as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..head import LEAST_ELEMENTS, into_convolution
from ..ops.checks import MAX_LEVELS, MAX_SEEN
from ..split_weight import split_product
from .lazy import Part, Upsampling

FEW_CELLS = 1024  # of a map: what pyramid_context_'s CUDA kernels are made for
LEAST_CHANNELS = 128  # of a map of more cells, where the kernel is larger than 1x1: the products of fewer may cost more


@dataclass(frozen=True)
class Convolution:
    """A convolution of a concatenation, keeping its size, and in inference the batch norm that follows.

    Attributes:
        parts: of the concatenation.
        merged: for each whether its projection and the convolution run as one linear map.
        low: for each whether it is convolved before its upsampling.
        size: (H, W) of the result.
        eps: of the norm, whose weight, bias, mean and variance are the last four tensors; None for no norm.
    """

    parts: tuple[Part, ...]
    merged: tuple[bool, ...]
    low: tuple[bool, ...]
    size: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    eps: float | None = None

    @classmethod
    def of(
        cls,
        parts: Sequence[tuple[Part, Sequence[Tensor]]],
        weight: tuple[int, ...],
        size: tuple[int, int],
        dilation: tuple[int, int],
        dtype: torch.dtype,
    ) -> "Convolution | None":
        """The convolution by a weight of this shape; None where convolving the concatenation is cheaper."""
        o, kernel, pixels = weight[0], weight[2:], size[0] * size[1]
        merged, low = [], []
        for part, sources in parts:
            cells, channels = cells_of(part, sources), sources[0].size(2)
            gain = part.channels * (channels + o) * cells - o * channels * (part.channels + cells)
            many_pay = not sources[0].is_cuda and (kernel == (1, 1) or part.channels >= LEAST_CHANNELS)
            low.append(part.upsampling is not None and cells < pixels and (cells <= FEW_CELLS or many_pay))
            before = low[-1] or part.upsampling is None  # not upsampled before it is convolved
            merged.append(part.projection is not None and kernel == (1, 1) and before and gain > 0)
        levels = [(p, s) for (p, s), is_low in zip(parts, low, strict=True) if is_low]
        sizes = [_size(part, sources) for part, sources in levels]
        if not 1 <= len(levels) <= MAX_LEVELS or sum(part.channels for part, _ in levels) * pixels < LEAST_ELEMENTS:
            return None
        if any(k * sum(s[axis] for s in sizes) > MAX_SEEN for axis, k in enumerate(kernel)):
            return None
        return cls(tuple(p for p, _ in parts), tuple(merged), tuple(low), size, dilation, dtype)

    def followed_by(self, eps: float) -> "Convolution":
        """The same with a norm."""
        return replace(self, eps=eps)

    def __call__(self, *tensors: Tensor, relu: bool = False) -> Tensor:
        """The result (N, O, H, W) from the sources of all parts, weight and, if there is one, bias, and the norm's."""
        rest = list(tensors)
        sources = [[rest.pop(0) for _ in range(part.takes)] for part in self.parts]
        norm: Any = (*rest[-4:], self.eps) if self.eps is not None else None
        weight, bias = rest[0], rest[1] if len(rest) in (2, 6) else None
        if norm is not None and ops.portable.exporting():
            (weight, bias), norm = into_convolution(norm, weight, bias), None
        kernel = (weight.size(2), weight.size(3))
        # Channels-last where the concatenation would be: torch's convolutions, their gradients above all, can take
        # several times as long in one of the two layouts, so that none is slower than it was.
        is_last = all(_is_channels_last(part, s) for part, s in zip(self.parts, sources, strict=True))
        layout = torch.channels_last if is_last else torch.contiguous_format
        channels, start = [], 0
        for part in self.parts:
            channels.append((start, part.channels))
            start += part.channels

        dense, maps, levels, products = [], [], [], {}
        for i in range(len(self.parts)):
            if self.merged[i]:
                matrix, shift = _merged(weight.narrow(1, *channels[i]), *sources[i][1:], dtype=self.dtype)
                bias = shift if bias is None else bias if shift is None else bias + shift
                products[i] = sources[i][0].to(self.dtype), matrix.t()  # (N, cells, D) @ (D, O)
            if self.low[i]:
                levels.append(i)
            elif not self.merged[i]:
                dense.append(i)
                maps.append(_map(self.parts[i], sources[i], self.size))
        plain = [i for i in levels if not self.merged[i]]
        cells = [_map(self.parts[i], sources[i]).to(self.dtype).permute(0, 2, 3, 1).flatten(1, 2) for i in plain]
        first = rows = None
        if plain:
            first, rows = split_product(weight, [channels[i] for i in dense], [channels[i] for i in plain], cells)
        elif dense:
            first = torch.cat([weight.narrow(1, *channels[i]) for i in dense], 1)

        output = None
        if first is not None:
            padding = tuple(k // 2 * d for k, d in zip(kernel, self.dilation, strict=True))
            map = (maps[0] if len(maps) == 1 else torch.cat(maps, 1)).contiguous(memory_format=layout)
            output = F.conv2d(map, first, bias, 1, padding, self.dilation)
            bias = None
        for i, product in products.items():
            if not self.low[i]:
                # by way of a matrix: a product of one image may have strides that no layout is recognised by
                rows_of_cells = _product(product).flatten(0, 2)
                map = rows_of_cells.view(product[0].size(0), *self.size, -1).permute(0, 3, 1, 2)
                output = map if output is None else output + map

        alike: dict[Any, list[int]] = {}  # levels that are upsampled alike are added in one pass
        for i in levels:
            alike.setdefault(self.parts[i].upsampling, []).append(i)
        if rows is not None and bias is None and plain == levels and len(alike) == 1:
            taps = [rows]
        else:
            of_level: dict[int, Any] = {i: products[i] for i in levels if self.merged[i]}
            if rows is not None:
                of_level |= zip(plain, rows.split([z.size(1) for z in cells], 1), strict=True)
            if bias is not None:
                least = min(levels, key=lambda i: cells_of(self.parts[i], sources[i]))
                of_level[least] = _product(of_level[least]) + _at_the_middle(bias.to(self.dtype), kernel)
            taps = [_concatenated([of_level[i] for i in group]) for group in alike.values()]
        if output is None:
            shape = (sources[0][0].size(0), weight.size(0), *self.size)
            output = torch.empty(shape, dtype=self.dtype, device=weight.device, memory_format=layout)
            is_sum = False
        else:
            is_sum = True
        for number, (upsampling, group) in enumerate(alike.items()):
            is_last = number == len(alike) - 1
            output = ops.pyramid_context_(
                output,
                taps[number],
                [_size(self.parts[i], sources[i]) for i in group],
                kernel,
                dilation=self.dilation,
                mode=upsampling.mode,
                align_corners=bool(upsampling.align_corners),
                norm=norm if is_last else None,
                relu=relu and is_last,
                accumulate=is_sum or number > 0,
            )
        return output


def _size(part: Part, sources: Sequence[Tensor]) -> tuple[int, int]:
    """(h, w) of a part's map before its upsampling."""
    return part.projection or (sources[0].size(2), sources[0].size(3))


def cells_of(part: Part, sources: Sequence[Tensor]) -> int:
    """How many cells a part's map has before its upsampling."""
    h, w = _size(part, sources)
    return h * w


def _is_channels_last(part: Part, sources: Sequence[Tensor]) -> bool:
    """Whether a part's map lies so and not contiguously, too; one of tokens does, transposed as they are."""
    if part.projection is not None:
        return part.channels > 1 and cells_of(part, sources) > 1
    return sources[0].is_contiguous(memory_format=torch.channels_last) and not sources[0].is_contiguous()


def _map(part: Part, sources: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
    """A part's map, with `size` after its upsampling."""
    map = sources[0]
    if part.projection is not None:
        map = F.linear(*sources).transpose(1, 2).unflatten(2, part.projection)
    return map if size is None or part.upsampling is None else interpolate(map, size, part.upsampling)


def interpolate(map: Tensor, size: tuple[int, int], upsampling: Upsampling) -> Tensor:
    """F.interpolate."""
    return F.interpolate(map, size, mode=upsampling.mode, align_corners=upsampling.align_corners)


def _product(taps: Any) -> Tensor:
    """Taps (N, cells, kh * kw, O), which may be two factors (N, cells, D) and (D, O) still."""
    return (taps[0] @ taps[1]).unsqueeze(2) if isinstance(taps, tuple) else taps


def _concatenated(parts: list[Any]) -> Tensor:
    """The taps of several levels as one; products write their place where autograd need not know of it."""
    factors = [part for part in parts if isinstance(part, tuple)]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for pair in factors for t in pair)
    if len(parts) == 1 or recorded or not factors or torch.compiler.is_compiling():
        products = [_product(part) for part in parts]
        return products[0] if len(parts) == 1 else torch.cat(products, 1)
    tokens, matrix = factors[0]
    counts = [(part[0] if isinstance(part, tuple) else part).size(1) for part in parts]
    taps = tokens.new_empty(tokens.size(0), sum(counts), 1, matrix.size(1))  # of a 1x1 kernel, where there are factors
    for part, place in zip(parts, taps.split(counts, 1), strict=True):
        if isinstance(part, tuple):
            for image, to in zip(part[0], place.flatten(2), strict=True):
                torch.mm(image, part[1], out=to)
        else:
            place.copy_(part)
    return taps


def _at_the_middle(bias: Tensor, kernel: tuple[int, int]) -> Tensor:
    """(O,) -> (kh * kw, O), a bias as what the tap in the middle sees: interpolation leaves a constant as it is."""
    middle = bias.new_zeros(kernel[0] * kernel[1], 1)
    middle[middle.size(0) // 2] = 1
    return middle * bias


def _merged(
    outer: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Two linear maps as one: (O, C) and (O,), from (O, D, 1, 1), (D, C) and (D,)."""
    matrix = outer.flatten(1).to(dtype)
    return matrix @ weight.to(dtype), None if bias is None else matrix @ bias.to(dtype)
