"""Runs the forward of a module in a Scope, and undoes that.

A fused module gets another class, derived from its own: torch's parametrizations and fully_shard do the same.
State_dict, children, attributes and isinstance stay as they were; deep copies, replicas and slices find the forward
where they look for it, in the type; and code that calls module.forward itself, as mmsegmentation's heads do, finds it,
too, which it would not with hooks.
"""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops._library import transforms_active
from .lazy import values
from .scope import Scope


class Fused(nn.Module):
    """Base of the derived classes."""

    _stock: type[nn.Module]  # the class of the module before

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: the derived class is made again from its base."""
        reduced: Any = super().__reduce_ex__(2)
        return _new, (type(self)._stock,), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in its place."""
        return remove(copy.copy(self))


def apply(module: nn.Module) -> None:
    """Fuses a module, in place."""
    if not isinstance(module, Fused):
        module.__class__ = _derived_class(type(module))


def remove(module: Any) -> Any:
    """The inverse of apply; returns the module."""
    if isinstance(module, Fused):
        module.__class__ = type(module)._stock  # type: ignore[assignment]
    return module


_derived: dict[type, type[nn.Module]] = {}


def _derived_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class of the fused modules of a class, always the same one."""
    if stock not in _derived:
        body = {"__module__": stock.__module__, "__doc__": stock.__doc__, "_stock": stock}
        name, bases = f"Fused{stock.__name__}", (Fused, stock)
        fused: Any = types.new_class(name, bases, exec_body=lambda space: space.update(body))
        fused.forward = _in_scope(fused, stock)
        _derived[stock] = fused
    return _derived[stock]


def _in_scope(fused: Any, stock: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class, under its signature, with upsampling put off.

    Under torch.compile, torch.jit and the transforms of torch.func it is the class's own and nothing else.
    """

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = super(fused, self).forward
        if _is_traced() or torch.jit.is_tracing() or transforms_active():
            return own(*args, **kwargs)
        with Scope(self):
            return values(own(*args, **kwargs))

    return forward


def _is_traced() -> bool:
    """Whether a compiler reads the code. torch.export without strict=True runs it, as ever."""
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return torch.compiler.is_compiling() and not exporting


def _new(base: type[nn.Module]) -> nn.Module:
    cls = _derived_class(base)
    return cls.__new__(cls)
