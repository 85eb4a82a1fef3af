"""The pools of a pyramid's levels, which read one map at several sizes: all in one read."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.checks import MAX_BINS, MAX_LEVELS, memory_format
from .rules import is_map

LEAST_ELEMENTS = 1 << 16  # of a map whose reading counts


class _Pooled(NamedTuple):
    map: "weakref.ref[Tensor]"
    version: int
    recorded: bool
    cells: Tensor  # (N, P, C)


class Pools:
    """Pooling in one forward of a module.

    When a map is pooled to the size of one of the layers nn.AdaptiveAvgPool2d that the module holds now, it is pooled
    to those of all of them, in one read; the others find theirs when they ask. What layers there are does not depend
    on earlier forwards, and so neither do the bits of the result.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._levels: tuple[tuple[int, int], ...] | None = None  # not looked up yet
        self._pooled: dict[int, _Pooled] = {}

    def pool(self, input: Any, output_size: Any) -> Any:
        """F.adaptive_avg_pool2d; NotImplemented where it has to run itself."""
        level = _as_level(output_size)
        if level is None or not is_map(input):
            return NotImplemented
        if input.numel() < LEAST_ELEMENTS and not ops.portable.exporting():
            return NotImplemented
        if torch.is_autocast_enabled(input.device.type) or level not in self._known():
            return NotImplemented
        levels = self._known()
        pooled = self._pooled.get(id(input))
        state = 0 if input.is_inference() else input._version, torch.is_grad_enabled() and input.requires_grad
        if pooled is None or pooled.map() is not input or (pooled.version, pooled.recorded) != state:
            pooled = _Pooled(weakref.ref(input), *state, ops.pyramid_pool(input, levels))
            self._pooled[id(input)] = pooled
        first = sum(h * w for h, w in levels[: levels.index(level)])
        cells = pooled.cells.narrow(1, first, level[0] * level[1])
        # a tensor of its own in the layout that it would have had, whatever is done with it
        return cells.transpose(1, 2).unflatten(2, level).clone(memory_format=memory_format(input))

    def _known(self) -> tuple[tuple[int, int], ...]:
        """The sizes of the module's layers, if there are several."""
        if self._levels is None:
            layers = [m for m in self._module.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
            sizes = dict.fromkeys(_as_level(layer.output_size) for layer in layers)
            levels = tuple(size for size in sizes if size is not None)
            self._levels = levels if 1 < len(levels) <= MAX_LEVELS else ()
        return self._levels


def _as_level(size: Any) -> tuple[int, int] | None:
    """(height, width) of an output_size; None where it depends on the map, or is none that ops.pyramid_pool takes."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(s, int) and 1 <= s <= MAX_BINS for s in pair):
        return None
    return pair[0], pair[1]
