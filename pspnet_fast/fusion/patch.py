"""Runs the forward of a module in a Scope, and undoes that.

A fused module gets another class, derived from its own: torch's parametrizations and fully_shard do the same.
State_dict, children, attributes and isinstance stay as they were; deep copies, replicas and slices find the forward
where they look for it, in the type; and code that calls module.forward itself, as mmsegmentation's heads do, finds it,
too, which it would not with hooks.
"""

import copy
import types
from typing import Any

import torch
from torch import nn

from ..ops._library import transforms_active
from .lazy import values
from .scope import Scope


class Fused(nn.Module):
    """Base of the derived classes."""

    _stock: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the module's own class, with upsampling put off.

        Under torch.compile, export, torch.jit and the transforms of torch.func it is the own class's and nothing else.
        """
        forward = super().forward
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_active():
            return forward(*args, **kwargs)
        with Scope():
            return values(forward(*args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: the derived class is made again from its base."""
        reduced: Any = super().__reduce_ex__(2)
        return _new, (type(self)._stock,), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in its place."""
        return remove(copy.copy(self))


def apply(module: nn.Module) -> nn.Module:
    """Fuses a module, in place."""
    if not isinstance(module, Fused):
        module.__class__ = _derived_class(type(module))
    return module


def remove(module: nn.Module) -> nn.Module:
    """The inverse of apply."""
    if isinstance(module, Fused):
        module.__class__ = type(module)._stock
    return module


_derived: dict[type, type[nn.Module]] = {}


def _derived_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of the fused modules of a class, always the same one."""
    if base not in _derived:
        body = {"__module__": base.__module__, "__doc__": base.__doc__, "_stock": base}
        _derived[base] = types.new_class(f"Fused{base.__name__}", (Fused, base), exec_body=lambda s: s.update(body))
    return _derived[base]


def _new(base: type[nn.Module]) -> nn.Module:
    cls = _derived_class(base)
    return cls.__new__(cls)
