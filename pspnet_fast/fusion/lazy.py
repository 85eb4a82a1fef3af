"""Maps that are not computed before something but a convolution wants them: upsampled ones and their concatenation."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

_PROPERTIES = ("device", "dtype", "is_cpu", "is_cuda", "is_leaf", "layout", "ndim", "requires_grad", "shape")
METADATA = {
    *(Tensor.dim, Tensor.element_size, Tensor.is_complex, Tensor.is_floating_point, Tensor.numel, Tensor.size),
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
}


class Lazy(Tensor):
    """A map that takes part in autograd as its value would, and has its shape and dtype, but no memory.

    Any torch function that takes it computes it first, under the grad mode and autocast of the place where the model's
    own forward would have; rules.py rewrites the few that need not. Where code takes it past torch's functions (a
    torch.autograd.Function, C++), autograd and the dispatcher see it as a tensor: value and gradient are right, too.
    """

    _sources: tuple[Tensor, ...]
    _compute: Callable[..., Tensor]
    _value: Tensor | None  # once computed, it alone counts
    _raw: Tensor | None  # for the dispatcher, below autograd
    _edge: Any  # in the graph, when made
    _state: "_State"
    _versions: tuple[int, ...]

    @classmethod
    def make(
        cls,
        compute: Callable[..., Tensor],
        sources: Sequence[Tensor],
        size: Sequence[int],
        dtype: torch.dtype,
        **attributes: Any,
    ) -> Any:
        """A map of a size (N, C, H, W) and dtype: compute(*sources), some time."""

        def wrapper() -> Any:
            return Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=sources[0].device)

        with torch._C.DisableTorchFunction():
            recorded = torch.is_grad_enabled() and any(s.requires_grad for s in sources)
            lazy = _Deferred.apply(wrapper, compute, *sources) if recorded else wrapper()
            lazy._edge, lazy._versions = lazy.grad_fn, _versions(sources)
            lazy._sources, lazy._compute, lazy._value, lazy._raw = tuple(sources), compute, None, None
            lazy._state = _State(sources[0].device.type)
            for name, value in attributes.items():
                setattr(lazy, name, value)
        return lazy

    def pending(self) -> bool:
        """Whether its sources may stand for it: nothing has computed it or given it another place in the graph."""
        with torch._C.DisableTorchFunction():
            return self._value is None and self.grad_fn is self._edge

    def replaceable(self) -> bool:
        """Whether what is computed of its sources now may stand for what is computed of it.

        Not where tensors saved for backward are handled otherwise than where it was made: a checkpoint begins or ends
        between them, which runs one part again without the other.
        """
        return self.pending() and self._state.hooks == saved_tensor_hooks()

    def value(self) -> Tensor:
        """The map itself; from now on it stays that tensor."""
        if self._value is None:
            with torch._C.DisableTorchFunction():
                if self.grad_fn is self._edge:
                    self._value = self._evaluate()
                else:  # a torch.autograd.Function has handed it on as its result: what it is made of has no graph
                    with torch.enable_grad():
                        self._value = self.clone()
        return self._value

    def sources(self) -> tuple[Tensor, ...]:
        """What it is made of, without a graph if it was made without one.

        Raises:
            RuntimeError: one has been written to where torch's functions do not show it.
        """
        with torch._C.DisableTorchFunction():
            if _versions(self._sources) != self._versions:
                raise RuntimeError(
                    "a map that a fused module upsamples or concatenates was changed in place before these were used, "
                    "and not by a function of torch: unfuse(model)"
                )
            return self._sources if self._state.grad else tuple(s.detach() for s in self._sources)

    def _evaluate(self) -> Tensor:
        if self._raw is None:
            with torch._C.DisableTorchFunction(), self._state.restored():
                self._raw = self._compute(*self.sources())
        return self._raw

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in METADATA and args[0].pending():
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)
        from .rules import rewrite  # which builds on this file

        result = rewrite(function, args, kwargs)
        return function(*values(args), **values(kwargs)) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def raw(lazy: Lazy) -> Tensor:
            return lazy._evaluate().detach()  # autograd has had its turn

        return function(*values(args, raw), **values(kwargs or {}, raw))


class Upsampling(NamedTuple):
    """How F.interpolate upsamples, by its arguments mode and align_corners, which "nearest" has not."""

    mode: Literal["bilinear", "nearest"] = "bilinear"
    align_corners: bool | None = None

    def exact(self, source: Sequence[int], size: Sequence[int]) -> bool:
        """Whether no rounding decides what a pixel gets.

        The nearest cell is found by a scale in floating point, which differs between torch's kernels and dtypes: where
        the scale is a fraction by a power of two, all of them find the same cells.
        """
        if self.mode != "nearest":
            return True
        parts = [to // math.gcd(s, to) for s, to in zip(source, size, strict=True)]
        return all(part & (part - 1) == 0 for part in parts)


class Part(NamedTuple):
    """One map of a concatenation.

    Attributes:
        channels: of the map.
        takes: how many sources.
        projection: (h, w) where these are tokens (N, h * w, C), weight and, if there are three, bias of F.linear, whose
            result is brought into the form of a map; None where the source is the map itself.
        upsampling: that follows; None for none.
    """

    channels: int
    takes: int = 1
    projection: tuple[int, int] | None = None
    upsampling: Upsampling | None = None


class Concat(Lazy):
    """torch.cat of maps along channels, or one map, upsampled or projected."""

    parts: tuple[Part, ...]

    def by_part(self) -> list[tuple[Part, tuple[Tensor, ...]]]:
        """Each part with its sources."""
        sources = iter(self.sources())
        return [(part, tuple(next(sources) for _ in range(part.takes))) for part in self.parts]


class Projected(Lazy):
    """F.linear of tokens (N, L, C) that is not a map yet: its sources are tokens, weight and perhaps bias.

    Attributes:
        transposed: whether channels come before tokens: (N, D, L).
    """

    transposed: bool


class Convolved(Lazy):
    """A convolution of lazy maps in inference, and the norm after it: the activation may run with them."""

    convolution: Any  # convolution.Convolution


def values(tree: Any, value: Callable[[Any], Tensor] = Lazy.value) -> Any:
    """Arguments with the value of every lazy map in its place, also in lists, tuples and dicts."""
    if isinstance(tree, Lazy):
        return value(tree)
    if isinstance(tree, (list, tuple)):
        new = [values(t, value) for t in tree]
        if all(a is b for a, b in zip(new, tree, strict=True)):
            return tree
        return type(tree)(*new) if hasattr(tree, "_fields") else type(tree)(new)
    if isinstance(tree, dict):
        changed = {k: new for k, t in tree.items() if (new := values(t, value)) is not t}
        if not changed:
            return tree
        if type(tree) is dict:
            return {**tree, **changed}
        for key, new in changed.items():  # an OrderedDict, an output class of a model: it stays what it is
            tree[key] = new
    return tree


def saved_tensor_hooks() -> Any:
    """The hooks through which autograd saves tensors now, those of a checkpoint for example; None for none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in tensors)


class _State:
    """What a result depends on beside its arguments: grad mode and autocast, as they are when this is made."""

    def __init__(self, device: str) -> None:
        self.device, self.grad = device, torch.is_grad_enabled()
        self.autocast, self.hooks = self._autocast(), saved_tensor_hooks()

    def _autocast(self) -> tuple[torch.dtype, bool]:
        return torch.get_autocast_dtype(self.device), torch.is_autocast_enabled(self.device)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self._autocast() != self.autocast:
                stack.enter_context(torch.autocast(self.device, *self.autocast))
            yield


class _Deferred(torch.autograd.Function):
    """Gives a lazy map its place in the graph; backward runs only where the map was taken past torch's functions."""

    @staticmethod
    def forward(ctx: Any, wrapper: Callable[[], Tensor], compute: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        ctx.compute = compute
        return wrapper()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        again, sources = torch.is_grad_enabled(), ctx.saved_tensors
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            inputs = sources if again else [s.detach().requires_grad_(s.requires_grad) for s in sources]
            wanted = [s for s in inputs if s.requires_grad]
            found = iter(torch.autograd.grad(ctx.compute(*inputs), wanted, grad, create_graph=again))
        return None, None, *(next(found) if s.requires_grad else None for s in inputs)
