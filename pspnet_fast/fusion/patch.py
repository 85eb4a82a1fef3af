"""What a fused module runs in place of its own forward.

A fused module keeps its children and gets another class, derived from its own: torch's parametrizations and
fully_shard do the same. State_dict, isinstance and every attribute stay as they were, and a deep copy, a data-parallel
replica and the compiler find the forward where they look for it, in the type. A forward set on the instance would stay
bound to the original in replicas, and put-in modules would lose what the owner knows of the old ones (an index into a
Sequential, align_corners of a head).
"""

import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..modules import FusedPPM
from .head import FusedPSPHead
from .structure import Chain, Structure, child, run


class Pending:
    """A map and the pyramid still to be concatenated to it: what a fused pyramid gives and its fused bottleneck takes.

    Between them it may only be concatenated to its own map, as a head does with a list of levels. Anything else raises,
    so that a model which also uses the concatenation elsewhere cannot silently compute something different.
    """

    def __init__(self, input: Tensor, ppm: FusedPPM) -> None:
        self.input, self.ppm = input, ppm

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "Pending":
        """torch.cat([x, pending], 1) is pending itself."""
        kwargs = kwargs or {}
        if function in (torch.cat, torch.concat):
            tensors = args[0] if args else kwargs.get("tensors")
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if dim in (1, -3) and len(tensors) == 2 and isinstance(tensors[1], cls) and tensors[0] is tensors[1].input:
                return tensors[1]
        raise RuntimeError(_MISUSE.format(f"torch function {getattr(function, '__name__', function)}"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(_MISUSE.format(f"attribute {name}"))


_MISUSE = (
    "the output of a fused pyramid is used otherwise than by the fused bottleneck beside it ({}): "
    "unfuse(model), then fuse(model, heads=False)"
)


class Fused(nn.Module):
    """Base of the derived classes' first parents."""

    _base: type[nn.Module]
    _structure: Any
    _bound: tuple[Any, Any]  # the modules that the fused one was made of, and it: in a tuple, so no child, no keys

    def _bind(self, parts: tuple[Any, ...], make: Callable[[], nn.Module]) -> Any:
        """The fused module; made anew where children were exchanged since, as convert_sync_batchnorm does."""
        if self._bound[0] != parts:
            self._bound = (parts, make())
        return self._bound[1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: the derived class is made again from its parents."""
        reduced: Any = super().__reduce_ex__(2)
        return _new, (type(self).__mro__[1], self._base), *reduced[2:]


class FusedPyramid(Fused):
    """In front of the class of a module that gives the concatenation."""

    def fused(self) -> FusedPPM:
        """The pyramid on this module's layers."""
        structure: Structure = self._structure
        parts = tuple(module for branch in structure.branches for module in _existing(branch, self))
        return self._bind(parts, lambda: structure.ppm(self))

    def forward(self, x: Tensor) -> Any:
        return self.fused()(x)


class PendingPyramid(FusedPyramid):
    """In front of the class of a module that gives the concatenation, or the list of levels, to a fused bottleneck."""

    def forward(self, x: Tensor) -> Any:
        pending = Pending(x, self.fused())
        return [pending] if self._structure.output == "maps" else pending


class FusedBottleneck(Fused):
    """In front of the class of a module that takes the concatenation."""

    def fused(self, ppm: FusedPPM) -> FusedPSPHead:
        """The head on a pyramid and this module's first layers."""
        chain: Chain = self._structure
        return self._bind((ppm, *_existing(chain, self)), lambda: FusedPSPHead(ppm, *chain.modules(self)))

    def forward(self, input: Any) -> Any:
        if not isinstance(input, Pending):
            return super().forward(input)
        return run([child(self, name) for name in self._structure.rest], self.fused(input.ppm)(input.input))


class FusedHead(Fused):
    """In front of the class of a module that has pyramid and bottleneck in itself."""

    def fused(self) -> FusedPSPHead:
        """The head on this module's layers."""
        structure: Structure = self._structure
        chains = (*structure.branches, cast(Chain, structure.bottleneck))
        parts = tuple(module for chain in chains for module in _existing(chain, self))
        return self._bind(parts, lambda: FusedPSPHead(structure.ppm(self), *chains[-1].modules(self)))

    def forward(self, x: Tensor) -> Any:
        return run([child(self, name) for name in self._structure.bottleneck.rest], self.fused()(x))


def apply(module: nn.Module, kind: type[Fused], structure: Structure | Chain) -> Any:
    """Fuses a module, in place; returns it."""
    module.__dict__.update(_structure=structure, _bound=(None, None))
    module.__class__ = _derive(kind, type(module))
    return module


def remove(module: Fused) -> None:
    """The inverse of apply."""
    module.__class__ = module._base  # type: ignore[assignment]
    del module._structure, module._bound


_derived: dict[tuple[type, type], type[nn.Module]] = {}


def _derive(kind: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """The class of the fused modules of a class, always the same one."""
    if (kind, base) not in _derived:
        body = {"__module__": base.__module__, "__doc__": base.__doc__, "_base": base}
        name = f"Fused{base.__name__}"
        _derived[kind, base] = types.new_class(name, (kind, base), exec_body=lambda space: space.update(body))
    return _derived[kind, base]


def _new(kind: type[Fused], base: type[nn.Module]) -> nn.Module:
    cls = _derive(kind, base)
    return cls.__new__(cls)


def _existing(chain: Chain, root: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(child(root, name) for name in chain.names if name is not None)
