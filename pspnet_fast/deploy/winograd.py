"""Large 3x3 convolutions of a graph as products with matrices: Winograd's minimal filtering (Lavin & Gray, CVPR 2016).

Along each axis a matrix takes the pixels under every tile to five values, another takes the results of a tile's five
places to its pixels; between them stands one product for each of the 25 places, 25 multiplications for 9 pixels instead
of 81. Dilation and padding are in the matrices alone.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pspnet_fast.optimization import winograd

_aten: Any = torch.ops.aten
_LEAST_WEIGHTS = 512 * 512  # with fewer, passes over the transformed map cost what the products save
_PLACES = winograd.TILE + 2


def rewrite_convolutions(module: Any) -> int:
    """Replaces the convolutions of a graph that it makes faster, in place; how many.

    These have a constant float32 weight of 512 * 512 and more channels, a window of 3x3, stride 1, and maps of a fixed
    size that they keep.
    """
    graph, count = module.graph, 0
    for node in list(graph.nodes):
        if node.target is _aten.conv2d.default and (convolution := _convolution(module, node)) is not None:
            with graph.inserting_before(node):
                found = _products(module, convolution, f"_winograd{count}")
            found.meta["val"] = node.meta["val"]  # the next one asks for its shape
            node.replace_all_uses_with(found)
            graph.erase_node(node)
            count += 1
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return count


class _Convolution(NamedTuple):
    input: fx.Node
    shape: list[int]
    weight: Tensor
    bias: Tensor | None
    dilation: tuple[int, int]


def _convolution(module: Any, node: Any) -> _Convolution | None:
    """One to replace."""
    defaults: tuple[Any, ...] = (None, None, None, (1, 1), (0, 0), (1, 1), 1)
    arguments: list[Any] = [*node.args, *defaults[len(node.args) :]]
    input, weight, bias, *settings, groups = arguments
    stride, padding, dilation = (tuple(2 * list(v))[:2] for v in settings)
    shape = list(input.meta["val"].shape)
    constant = all(n is None or n.op == "get_attr" for n in (weight, bias))
    if not constant or stride != (1, 1) or padding != dilation or groups != 1 or any(type(s) is not int for s in shape):
        return None
    weight, bias = (n and operator.attrgetter(n.target)(module) for n in (weight, bias))
    o, c, *window = weight.shape
    if window != [winograd.TILE] * 2 or weight.dtype != torch.float32 or o * c < _LEAST_WEIGHTS:
        return None
    if not winograd.has_fewer_products((shape[2], shape[3]), dilation):
        return None
    return _Convolution(input, shape, weight, bias, dilation)


def _products(module: Any, convolution: _Convolution, prefix: str) -> fx.Node:
    graph = module.graph
    input, (n, c, height, width), weight, bias, dilation = convolution
    o = weight.size(0)
    rows, row_results = axis_matrices(height, dilation[0])
    columns, column_results = axis_matrices(width, dilation[1])
    down, across = len(rows) // _PLACES, len(columns) // _PLACES

    def constant(name: str, value: Tensor) -> fx.Node:
        module.register_buffer(f"{prefix}_{name}", value.float().contiguous())
        return graph.get_attr(f"{prefix}_{name}")

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    matmul, reshape, permute = _aten.matmul.default, _aten.reshape.default, _aten.permute.default
    seen = call(matmul, input, constant("columns", columns.t()))
    seen = call(matmul, constant("rows", rows), seen)  # (N, C, 5 * down, 5 * across)
    seen = call(reshape, seen, [n, c, _PLACES, down, _PLACES, across])
    seen = call(reshape, call(permute, seen, [2, 4, 1, 0, 3, 5]), [_PLACES**2, c, n * down * across])
    places = constant("weight", winograd.transformed_weight(weight.double()).transpose(1, 2))
    found = call(reshape, call(matmul, places, seen), [_PLACES, _PLACES, o, n, down, across])
    found = call(reshape, call(permute, found, [3, 2, 0, 4, 1, 5]), [n, o, _PLACES * down, _PLACES * across])
    found = call(matmul, found, constant("column_results", column_results))
    found = call(matmul, constant("row_results", row_results.t()), found)
    return found if bias is None else call(_aten.add.Tensor, found, constant("bias", bias.view(o, 1, 1)))


def axis_matrices(size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """What a tile sees of an axis, and what it gives to it: both (5 * tiles, size), float64.

    The tiles of a dilated convolution lie in its phases, the pixels `dilation` apart, one phase after another.
    """
    count, length = winograd.tiles(size, dilation), dilation * winograd.TILE
    starts = [phase + length * tile for phase in range(dilation) for tile in range(count)]
    seen, given = torch.zeros(2, _PLACES, len(starts), size, dtype=torch.float64).unbind()
    to_places, to_pixels = (torch.tensor(m, dtype=torch.float64) for m in (winograd.INPUT, winograd.OUTPUT))
    for tile, start in enumerate(starts):
        for i in range(_PLACES):
            if 0 <= (pixel := start + (i - 1) * dilation) < size:
                seen[:, tile, pixel] += to_places[:, i]
        for i in range(winograd.TILE):
            if (pixel := start + i * dilation) < size:
                given[:, tile, pixel] += to_pixels[i]
    return seen.flatten(0, 1), given.flatten(0, 1)
