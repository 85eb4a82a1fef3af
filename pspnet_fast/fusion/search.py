"""Which modules of a model to fuse: by what their code looks like, or by what a forward on an example computes."""

import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.random import fork_rng

from .convolution import cells_of
from .lazy import Concat, Lazy
from .patch import Fused, apply, remove
from .scope import Scope


@dataclass(frozen=True)
class LowResolution:
    """A convolution that took upsampled maps at their own resolution in the forward on the example.

    Attributes:
        module: its name, or that of the module whose forward calls F.conv2d.
        scope: the module in whose forward the maps are upsampled and the convolution runs: what fuse changes.
        channels, of: how many of its input channels are upsampled ones.
        saved: the share of its multiply-adds that goes.
    """

    module: str
    scope: str
    channels: int
    of: int
    saved: float

    def __str__(self) -> str:
        return (
            f"{self.module!r}, in {self.scope!r}: {self.channels} of {self.of} input channels convolved before their "
            f"upsampling, {self.saved:.0%} of its multiply-adds saved"
        )


def candidates(model: nn.Module) -> dict[str, str]:
    """The modules that look as if they upsampled maps for a convolution, and for each the one to fuse.

    A pyramid has layers nn.AdaptiveAvgPool2d of more than one size, or its code calls adaptive_avg_pool2d and
    interpolate. The one to fuse is the nearest module above with a forward: the concatenation and the convolution of
    it, if these are not the pyramid's own, are there. And a module whose code upsamples is one to fuse, or the nearest
    above, if it concatenates and has convolutions.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        sizes = {str(m.output_size) for m in module.modules() if isinstance(m, nn.AdaptiveAvgPool2d)}
        called = _called(type(module))
        upsamples = not called.isdisjoint(_UPSAMPLING)
        if (len(sizes) > 1 or ("adaptive_avg_pool2d" in called and upsamples)) and _has_forward(module):
            found = {n: o for n, o in found.items() if n and (o == n or not name.startswith(n + "."))}
            found[name] = _above(model, name)
        upsamples = upsamples or any(isinstance(child, nn.Upsample) for child in module.children())
        if name in found or not upsamples:
            continue
        owner = name if called & _CONCATENATING else _above(model, name)
        above = module if owner == name else model.get_submodule(owner)
        if _called(type(above)) & _CONCATENATING and any(isinstance(m, nn.Conv2d) for m in above.modules()):
            found[name] = owner
    # what lies in a module that is fused needs no scope of its own, at whose end everything would be computed
    owners = set(found.values())
    return {n: o for n, o in found.items() if not any(o != p and (not p or o.startswith(p + ".")) for p in owners)}


_UPSAMPLING = {"interpolate", "upsample", "resize"}  # resize: mmsegmentation's function
_OTHERWISE = {"bicubic", "trilinear", "linear"}  # modes of position embeddings, for example
_CONCATENATING = {"cat", "concat"}


def _called(cls: type) -> set[str]:
    """The global names and attributes in the code of a class's methods, torch's own layers left out.

    Not those of upsampling where it is of another kind, nor a layer that is called resize.
    """
    names: set[str] = set()
    codes = [
        (function.__code__, function.__globals__)
        for base in cls.__mro__
        if not base.__module__.startswith("torch.")
        for function in vars(base).values()
        if isinstance(function, types.FunctionType)
    ]
    while codes:
        code, known = codes.pop()
        called = set(code.co_names)
        if "resize" not in known:
            called.discard("resize")
        if not _OTHERWISE.isdisjoint(c for c in code.co_consts if isinstance(c, str)):
            called -= _UPSAMPLING
        names |= called
        codes += [(constant, known) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names


def _above(model: nn.Module, name: str) -> str:
    while name:
        name = name.rpartition(".")[0]
        if _has_forward(model.get_submodule(name)):
            break
    return name


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def trial(model: nn.Module, example: Any) -> list[LowResolution]:
    """What a forward on an example convolves at low resolution, in evaluation, without gradients.

    Args:
        example: a tensor, the tuple of the positional arguments, or the dictionary of the keyword arguments.
    """
    watched = _Trial(model)
    modes = [(module, module.training) for module in model.modules()]
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    args: Any = () if isinstance(example, Mapping) else (example,) if isinstance(example, Tensor) else example
    kwargs: Any = example if isinstance(example, Mapping) else {}
    for own in fused:  # whose scopes would be others
        remove(own)
    model.eval()
    try:
        with fork_rng(), torch.no_grad(), watched.stack_kept(), watched:
            model(*args, **kwargs)
    finally:
        for module, training in modes:
            module.training = training
        for stock in fused:
            apply(stock)
    return watched.found


class _Trial(Scope):
    """A scope that notes where maps are upsampled and where they are convolved."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.found: list[LowResolution] = []

    @contextmanager
    def stack_kept(self) -> Iterator[None]:
        """Keeps the names of the modules whose forward runs."""

        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(self.names.get(module, self.stack[-1] if self.stack else ""))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lazy: Any = next((a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Lazy)), None)
        watched = function is torch.conv2d and isinstance(lazy, Concat) and lazy.pending()
        result = super().__torch_function__(function, types, args, kwargs)
        if isinstance(result, Lazy):
            made: Any = result
            made.made = _common([self.stack, *(p.made for p in _lazy((args, kwargs)))])
        if watched and lazy.pending():
            self._note(lazy, result)
        return result

    def _note(self, lazy: Concat, output: Tensor) -> None:
        low = [(part, sources) for part, sources in lazy.by_part() if part.upsampling is not None]
        channels, pixels = sum(part.channels for part, _ in low), lazy.size(2) * lazy.size(3)
        cells = sum(part.channels * cells_of(part, sources) for part, sources in low)
        saved = (channels * pixels - cells) / (lazy.size(1) * pixels)
        scope = _common([self.stack, lazy.made])[-1]  # type: ignore[attr-defined]
        self.found.append(LowResolution(self.stack[-1], scope, channels, lazy.size(1), saved))


def _lazy(tree: Any) -> Iterator[Any]:
    """The lazy maps among arguments."""
    if isinstance(tree, Lazy):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for entry in tree:
            yield from _lazy(entry)
    elif isinstance(tree, dict):
        yield from _lazy(list(tree.values()))


def _common(stacks: Sequence[Sequence[str]]) -> list[str]:
    """The longest beginning that stacks of names share."""
    shared: list[str] = []
    for names in zip(*stacks, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return shared
