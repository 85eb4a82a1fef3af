"""What a fused module runs in place of its own forward.

A fused module keeps its children and gets another class, derived from its own: torch's parametrizations and
fully_shard do the same. State_dict, isinstance and every attribute stay as they were, and a deep copy, a data-parallel
replica and the compiler find the forward where they look for it, in the type. A forward set on the instance would stay
bound to the original in replicas, and put-in modules would lose what the owner knows of the old ones (an index into a
Sequential, align_corners of a head).
"""

import types
from typing import Any

import torch
from torch import Tensor, nn

from ..head import KeepsSplitWeight, SplitWeight, psp_head
from ..modules import FusedPPM
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: the derived class is made again from its parents."""
        reduced: Any = super().__reduce_ex__(2)
        return _new, (type(self).__mro__[1], self._base), *reduced[2:]


class FusedPyramid(Fused):
    """In front of the class of a module that gives the concatenation."""

    _structure: Any
    _bound: tuple[Any, Any]  # layers, and the pyramid made of them: in a tuple, so that it is no child and has no keys

    def ppm(self) -> FusedPPM:
        """The pyramid on this module's layers; made anew where some were exchanged, as convert_sync_batchnorm does."""
        structure: Structure = self._structure
        layers = [child(self, name) for branch in structure.branches for name in branch.names if name is not None]
        if self._bound[0] != layers:
            self._bound = (layers, structure.ppm(self))
        return self._bound[1]

    def forward(self, x: Tensor) -> Any:
        return self.ppm()(x)


class PendingPyramid(FusedPyramid):
    """In front of the class of a module that gives the concatenation, or the list of levels, to a fused bottleneck."""

    def forward(self, x: Tensor) -> Any:
        pending = Pending(x, self.ppm())
        return [pending] if self._structure.output == "maps" else pending


class FusedBottleneck(Fused, KeepsSplitWeight):
    """In front of the class of a module that takes the concatenation."""

    _chain: Any

    def forward(self, input: Any) -> Any:
        if not isinstance(input, Pending):
            return super().forward(input)
        return _run_head(self, self._chain, input.ppm, input.input)


class FusedHead(FusedPyramid, KeepsSplitWeight):
    """In front of the class of a module that has pyramid and bottleneck in itself."""

    def forward(self, x: Tensor) -> Any:
        return _run_head(self, self._structure.bottleneck, self.ppm(), x)


def _run_head(root: KeepsSplitWeight, chain: Chain, ppm: FusedPPM, x: Tensor) -> Tensor:
    return run([child(root, name) for name in chain.rest], psp_head(x, ppm, *chain.modules(root), root._split))


def apply(model: nn.Module, pyramid: str, structure: Structure, bottleneck: tuple[str, Chain] | None) -> None:
    """Fuses a pyramid, and a bottleneck beside it, in place."""
    module, state = child(model, pyramid), {"_structure": structure, "_bound": (None, None)}
    kind: type[FusedPyramid] = FusedPyramid if bottleneck is None else PendingPyramid
    if structure.output == "head":
        kind, state = FusedHead, {**state, "_split": SplitWeight()}
    fused: Any = _derive(module, kind, state)
    fused.ppm()  # made now: the compiler finds it ready
    if bottleneck is not None:
        _derive(child(model, bottleneck[0]), FusedBottleneck, {"_chain": bottleneck[1], "_split": SplitWeight()})


def _derive(module: nn.Module, kind: type[Fused], state: dict[str, Any]) -> nn.Module:
    module.__dict__.update(state)
    module.__class__ = _derived_class(kind, type(module))
    return module


def remove(module: Fused) -> None:
    """The inverse of apply."""
    module.__class__ = module._base  # type: ignore[assignment]
    for name in ("_structure", "_bound", "_chain", "_split"):
        module.__dict__.pop(name, None)


_derived: dict[tuple[type, type], type[nn.Module]] = {}


def _derived_class(kind: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """The class of the fused modules of a class, always the same one."""
    if (kind, base) not in _derived:
        body = {"__module__": base.__module__, "__doc__": base.__doc__, "_base": base}
        name = f"Fused{base.__name__}"
        _derived[kind, base] = types.new_class(name, (kind, base), exec_body=lambda space: space.update(body))
    return _derived[kind, base]


def _new(kind: type[Fused], base: type[nn.Module]) -> nn.Module:
    cls = _derived_class(kind, base)
    return cls.__new__(cls)
