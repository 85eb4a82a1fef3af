"""Inside a fused module's forward: upsampling is put off, and whatever would notice gets the map first."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .lazy import Lazy, saved_tensor_hooks
from .pools import Pools
from .rules import rewrite

# these write to none of their maps
_READING = {
    F.interpolate,
    F.adaptive_avg_pool2d,
    F.batch_norm,
    F.linear,
    torch.cat,
    torch.concat,
    torch.conv2d,
    Tensor.size,
}
_BEGINNING = {F.interpolate, F.linear, F.adaptive_avg_pool2d}  # what runs otherwise on computed maps


class Deferring(TorchFunctionMode):
    """The time of one forward, in one thread, in which some functions of torch give lazy maps.

    Every function of torch that is called in it shows here. One that might write to what a lazy map is made of finds
    the map computed. At the end nothing lazy is left, whoever holds it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lazy: list[weakref.ref[Lazy]] = []

    def _deferred(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a function gives otherwise than by being called; NotImplemented for nothing."""
        raise NotImplementedError

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._deferred(function, args, kwargs)
        if result is NotImplemented:
            if self._lazy:
                self._before(function, args, kwargs)
            result = function(*args, **kwargs)
        if isinstance(result, Lazy):
            self._lazy.append(weakref.ref(result))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for lazy in self._pending():
            lazy.value()

    def _pending(self) -> list[Lazy]:
        alive = [(reference, reference()) for reference in self._lazy]
        pending = [(reference, lazy) for reference, lazy in alive if lazy is not None and lazy.pending()]
        self._lazy = [reference for reference, _ in pending]
        return [lazy for _, lazy in pending]

    def _before(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Computes the maps whose sources a function might write to: those that share memory with its arguments."""
        if (function in _READING and "out" not in kwargs) or getattr(function, "__name__", "") == "__get__":
            return
        touched = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        for lazy in self._pending():
            if touched & {_memory(source) for source in lazy._sources}:
                lazy.value()


class Scope(Deferring):
    """The forward of a fused module: upsampling is put off."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._pools = Pools(module)
        self._hooks = saved_tensor_hooks()

    def _deferred(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if function not in _BEGINNING or saved_tensor_hooks() != self._hooks:
            return NotImplemented
        if function is not F.adaptive_avg_pool2d:
            return rewrite(function, args, kwargs)
        return self._pools.pool(*args) if len(args) == 2 and not kwargs else NotImplemented


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if not isinstance(tree, Lazy):
            yield tree
    elif isinstance(tree, (list, tuple, set)):
        for entry in tree:
            yield from _tensors(entry)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _memory(tensor: Tensor) -> int:
    """What tells memory from other memory; the tensor itself where it has none of its own."""
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return id(tensor)
