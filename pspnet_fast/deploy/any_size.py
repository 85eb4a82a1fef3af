"""Pooling and upsampling of a pyramid in ONNX for sizes known at run time only: resized pictures of the cells.

A matrix of averages or of upsampling weights holds a picture for each cell, (P, H, W), a small one resized:

- On a grid that all numbers of bins divide a cell is a rectangle of squares. Enlarged by H and W, so that a pixel is a
  window of that grid, it touches a pixel, or its maximum in the window is 1, just where adaptive pooling counts it.
- The weights of bilinear upsampling are linear between cells, so they are resized by the same formula from any grid
  that has a point at each cell: with align_corners one for all levels, otherwise one a level.

Three operators stand for it in exported programs, and become ONNX's own in the file; only there are they used.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pspnet_fast.ops import portable
from pspnet_fast.ops.checks import NEAREST, unflatten

_LARGEST = 32  # side of a picture; with bins of larger common multiples the matrices are computed from numbers


class AnySize(portable.Portable):
    """Within it operators of pyramids become those of this file, where their pictures are small."""

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """What runs for a function of torch's or an operator of ours."""
        replacement = _TABLE.get(function)
        found = None if replacement is None else replacement(*args, **kwargs)
        return super().call(function, *args, **kwargs) if found is None else found


# ---- pictures ------------------------------------------------------------------------------------------------------


def _picture(bins: list[int], side: tuple[int, int], row: Callable[[int, int, int], Tensor]) -> Tensor:
    """(1, P, *side): of each cell its row's values by its column's; `row(i, b, n)` gives those of cell i of b."""
    cells = [(i, h, j, w) for h, w in unflatten(bins) for i in range(h) for j in range(w)]
    return torch.stack([row(i, h, side[0])[:, None] * row(j, w, side[1]) for i, h, j, w in cells])[None]


def inside(bins: list[int]) -> Tensor | None:
    """The picture of adaptive pooling's cells; None if it were too large."""
    side = math.lcm(*bins[::2]), math.lcm(*bins[1::2])
    if max(side) > _LARGEST:
        return None
    return _picture(bins, side, lambda i, b, n: (torch.arange(n) * b // n == i).float())


def weights(bins: list[int], interpolation: int) -> list[Tensor] | None:
    """The pictures of bilinear weights, one of all levels or one a level; None if there are none."""
    if interpolation == NEAREST:
        return None
    side = (1 + math.lcm(*(b - 1 for b in bins[axis::2] if b > 1)) for axis in range(2))
    height, width = side
    if interpolation == 1 and max(height, width) <= _LARGEST:
        return [_picture(bins, (height, width), _hat)]
    return [torch.eye(h * w).view(1, h * w, h, w) for h, w in unflatten(bins)]


def _hat(i: int, b: int, n: int) -> Tensor:
    """1 at cell i of b on n points from the first cell to the last, and 0 at the others."""
    return (1 - (torch.arange(n) * ((b - 1) / (n - 1 or 1)) - i).abs()).clamp(min=0)


# ---- operators of exported programs --------------------------------------------------------------------------------


@torch.library.custom_op("pspnet_fast_export::pool", mutates_args=())
def pool(map: Tensor, picture: Tensor) -> Tensor:
    """A map (N, C, H, W) averaged in cells (1, P, h, w) as adaptive pooling does: (N, C, P)."""
    side, size = picture.shape[2:], map.shape[2:]
    fine = F.interpolate(picture, (side[0] * size[0], side[1] * size[1]), mode="nearest-exact")
    cells = F.max_pool2d(fine, side)
    return map.flatten(2) @ (cells / cells.sum((2, 3), keepdim=True)).flatten(2)[0].t()


@torch.library.custom_op("pspnet_fast_export::context", mutates_args=())
def context(
    conv: Tensor, products: Tensor, pictures: list[Tensor], taps: Tensor, dilation: list[int], align_corners: bool
) -> Tensor:
    """conv (N, O, H, W) + products (N, O, P * kh * kw) of cells, upsampled, seen by taps (P * kh * kw, 1, kh, kw)."""
    size = (conv.size(2), conv.size(3))
    levels = [F.interpolate(p, size, mode="bilinear", align_corners=align_corners) for p in pictures]
    values = torch.cat(levels, 1)
    padding = [d * (k // 2) for d, k in zip(dilation, taps.shape[2:], strict=True)]
    seen = F.conv2d(values, taps, padding=padding, dilation=dilation, groups=values.size(1))
    return conv + (products @ seen[0].flatten(1)).unflatten(2, size)


@torch.library.custom_op("pspnet_fast_export::resize", mutates_args=())
def resize(logits: Tensor, image: Tensor, first: int, align_corners: bool) -> Tensor:
    """Logits (N, K, h, w) bilinearly at the size of an image, whose height is its axis `first`: (N, K, H, W)."""
    size = (image.size(first), image.size(first + 1))
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


pool.register_fake(lambda map, picture: map.new_empty(map.size(0), map.size(1), picture.size(1)))
context.register_fake(lambda conv, *_: torch.empty_like(conv))
resize.register_fake(
    lambda logits, image, first, _: logits.new_empty(
        logits.size(0), logits.size(1), image.size(first), image.size(first + 1)
    )
)


# ---- in place of ours ----------------------------------------------------------------------------------------------


def _pool(input: Tensor, bins: list[int]) -> Tensor | None:
    picture = inside(bins)
    return None if picture is None else pool(input, picture).transpose(1, 2)


def _context(conv: Tensor, taps: Tensor, norm: list[Tensor], eps: float, relu: bool, *window: Any) -> Tensor | None:
    bins, kernel, dilation, interpolation, accumulate = window
    pictures = weights(bins, interpolation)
    places = kernel[0] * kernel[1]
    if pictures is None or norm or not accumulate or taps.size(1) > portable.FEW_CELLS:
        return None
    one_hot = torch.eye(places).view(places, 1, *kernel).repeat(taps.size(1), 1, 1, 1)
    total = context(conv, taps.flatten(1, 2).transpose(1, 2), pictures, one_hot, dilation, interpolation == 1)
    return conv.copy_(total.relu() if relu else total)


_ours: Any = torch.ops.pspnet_fast
_TABLE: dict[Any, Any] = {_ours.pyramid_pool_alone.default: _pool, _ours.pyramid_context_.default: _context}


# ---- in ONNX -------------------------------------------------------------------------------------------------------


def translations() -> dict[Any, Any]:
    """How torch.onnx.export writes the operators."""
    from onnxscript import opset18 as op

    def integers(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def bilinear(align_corners: bool) -> dict[str, Any]:
        return {"mode": "linear", "coordinate_transformation_mode": "align_corners" if align_corners else "half_pixel"}

    def write_pool(map: Any, picture: Any) -> Any:
        side = [int(s) for s in picture.shape[2:]]
        size = op.Mul(op.Shape(map, start=2), integers(*side))
        modes: dict[str, Any] = {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_floor"}
        fine = op.Resize(picture, None, None, size, axes=[2, 3], mode="nearest", **modes)
        cells = op.MaxPool(fine, kernel_shape=side, strides=side)[0]
        cells = op.Div(cells, op.ReduceSum(cells, integers(2, 3), keepdims=1))
        averages = op.Transpose(op.Reshape(cells, integers(int(picture.shape[1]), -1)), perm=[1, 0])
        return op.MatMul(op.Reshape(map, integers(0, 0, -1)), averages)

    def write_context(
        conv: Any, products: Any, pictures: Any, taps: Any, dilation: list[int], align_corners: bool
    ) -> Any:
        size = op.Shape(conv, start=2)
        levels = [op.Resize(p, None, None, size, axes=[2, 3], **bilinear(align_corners)) for p in pictures]
        values = op.Concat(*levels, axis=1) if len(levels) > 1 else levels[0]
        places, _, *kernel = (int(s) for s in taps.shape)
        pads = 2 * [d * (k // 2) for d, k in zip(dilation, kernel, strict=True)]
        group = places // (kernel[0] * kernel[1])
        seen = op.Conv(values, taps, kernel_shape=kernel, dilations=dilation, pads=pads, group=group)
        added = op.MatMul(products, op.Reshape(seen, integers(places, -1)))
        return op.Add(conv, op.Reshape(added, op.Concat(integers(0, int(conv.shape[1])), size, axis=0)))

    def write_resize(logits: Any, image: Any, first: int, align_corners: bool) -> Any:
        size = op.Shape(image, start=first, end=first + 2)
        return op.Resize(logits, None, None, size, axes=[2, 3], **bilinear(align_corners))

    exported: Any = torch.ops.pspnet_fast_export
    return {
        exported.pool.default: write_pool,
        exported.context.default: write_context,
        exported.resize.default: write_resize,
    }
