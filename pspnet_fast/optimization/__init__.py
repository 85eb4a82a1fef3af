"""optimize: a frozen copy of a model for inference inside PyTorch."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import is_tensor_like
from torch.utils._pytree import tree_leaves, tree_map

from ..fusion.lazy import values
from ..layers import needs_plain
from .folding import Folding, Packs
from .graphs import Graphs
from .head import freeze_heads

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
_AGREE = {torch.float32: 1e-4, torch.float64: 1e-10}  # of the greatest output, on an example


class Optimized(nn.Module):
    """What :func:`optimize` returns: the forward of a frozen model, whose attributes can be read through it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False)
        own = next((t.dtype for _, t in _tensors(model) if t.is_floating_point()), torch.float32)
        self._dtype = dtype or own
        model = freeze_heads(model, self._dtype)
        # what convolutions are folded from, by name, where the model itself is rounded
        self._exact = {n: t.detach().clone() for n, t in _tensors(model)} if self._dtype != own else None
        self.model = model.to(self._dtype) if self._exact else model
        self.training = False
        self._prepare()

    def _prepare(self) -> None:
        tensors = dict(_tensors(self.model))
        exact = self._exact or tensors
        self._packs = Packs({id(t): exact[name] for name, t in tensors.items()}, self._dtype)
        self._device = next((t.device for t in tensors.values()), torch.device("cpu"))
        self._graphs = Graphs(self._run) if self._device.type == "cuda" else None

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in self.__dict__.items() if n not in ("_packs", "_device", "_graphs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        leaves = tree_leaves((args, kwargs))
        if self._has_to_be_stock(leaves):
            return self.model(*args, **kwargs)
        args, kwargs = tree_map(self._brought, args), tree_map(self._brought, kwargs)
        if self._graphs and not kwargs and all(isinstance(a, Tensor) and a.is_cuda and a.numel() for a in args):
            with torch.no_grad():
                return self._graphs(*args)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), Folding(self._packs):
            return values(self.model(*args, **kwargs))

    def _brought(self, leaf: Any) -> Any:
        """An argument in the dtype and layout of the model."""
        if isinstance(leaf, Tensor) and self._exact and leaf.is_floating_point():
            leaf = leaf.to(self._dtype)
        is_map = isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.device == self._device
        return leaf.contiguous(memory_format=torch.channels_last) if is_map else leaf

    def _has_to_be_stock(self, leaves: list[Any]) -> bool:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(self._device.type):
            return True
        if torch._C._get_tracing_state() is not None:
            return True
        tensors = [leaf for leaf in leaves if is_tensor_like(leaf)]
        if any(needs_plain(t) or t.layout != torch.strided for t in tensors):
            return True
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def train(self, mode: bool = True) -> "Optimized":
        """Only out of training mode.

        Raises:
            RuntimeError: mode is True.
        """
        if mode:
            self._frozen("trained")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "Optimized":
        """Only to False.

        Raises:
            RuntimeError: requires_grad is True.
        """
        if requires_grad:
            self._frozen("trained")
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises RuntimeError: load into the model and optimize it again."""
        self._frozen("given other weights")

    def _apply(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._frozen("moved or converted")

    def _frozen(self, what: str) -> NoReturn:
        raise RuntimeError(f"an optimized model cannot be {what}: change the model it was made of, and optimize again")


def optimize(model: nn.Module, example: Example | None = None, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A frozen copy of a model, for inference inside PyTorch, with the same outputs.

    The copy's own forward runs, whatever its code, in evaluation mode. But in it a convolution, the batch norm after
    it, the addition of a map and ReLU run as one, from weights that are folded (in float64) and packed once: on a CPU
    by oneDNN's operators, and in float32 large 3x3 convolutions by Winograd's algorithm, which errs no more than they;
    maps are channels-last. Heads of PSPNet and FusedPSPHead are split and packed, too. On CUDA a graph is captured for
    each of the first few shapes that recur. Works as well for models of others, also after :func:`pspnet_fast.fuse`:
    layers with hooks, parametrizations or a forward of their own are run as they are.

    Where a gradient is needed, under autocast, torch.compile, torch.jit, torch.fx, torch.func and for tensor
    subclasses, the copy's plain forward runs. Later changes of `model` do not reach the copy, and its own parameters
    must not be changed. An infinite value or NaN in a map may spread to pixels up to two farther than by the model.

    Args:
        model: any module; it stays as it is, and in its mode.
        example: arguments of a forward (a tensor, a tuple, or a dictionary by names) to run once: packs the weights
            for these sizes, and compares with the model. Without it they are packed in the first forward.
        dtype: to compute in, such as torch.bfloat16 on a processor with AVX512-BF16 or AMX, or on a GPU; floating
            arguments are converted, and outputs are in it. None leaves the model's own: no precision changes unasked.

    Returns:
        A module with the model's forward and attributes. It can be called, copied and pickled; training it, loading
        weights into it, moving and converting it raise RuntimeError.

    Raises:
        TypeError: model is no module.
        ValueError: dtype is no floating one.
        RuntimeError: the outputs on the example differ: the model's forward is random, or keeps a state.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, but is a {type(model).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, but is {dtype}")
    if isinstance(model, Optimized):
        model = model.model
    optimized = Optimized(model, dtype)
    if example is not None:
        _compare(model, optimized, example)
    return optimized


def _compare(model: nn.Module, optimized: Optimized, example: Any) -> None:
    args: Any = () if isinstance(example, Mapping) else (example,) if isinstance(example, Tensor) else example
    kwargs: Any = example if isinstance(example, Mapping) else {}
    with torch.no_grad():
        found = [t for t in tree_leaves(optimized(*args, **kwargs)) if isinstance(t, Tensor)]
        tolerance = _AGREE.get(optimized._dtype)
        if tolerance is None or optimized._exact:  # its rounding depends on the model
            return
        expected = [t for t in tree_leaves(optimized.model(*args, **kwargs)) if isinstance(t, Tensor)]
    for one, other in itertools.zip_longest(found, expected):
        if one is None or other is None or one.shape != other.shape:
            raise RuntimeError("what is optimized gives other outputs than the model on the example")
        if one.numel() and one.is_floating_point():
            difference = (one - other).abs().max().item() / max(other.abs().max().item(), 1e-30)
            if not difference <= tolerance:
                raise RuntimeError(
                    f"what is optimized differs from the model on the example, by {difference:.1e} of the greatest "
                    "output: does its forward draw random numbers, keep a state, or give NaN?"
                )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, shared ones under each."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


__all__ = ["Optimized", "optimize"]
