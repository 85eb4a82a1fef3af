"""Loads the compiled operators and registers what torch needs to know of them from Python."""

import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "pspnet_fast"
NEWEST_TESTED = (2, 14)  # torch; the oldest is in setup.py
_LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"


def _missing() -> str:
    """What is wrong and what helps where the kernels are not beside this package."""
    package = _LIBRARY.parent
    others = [Path(folder or ".").resolve() / package.name for folder in sys.path]
    for other in others:
        if other != package and (other / _LIBRARY.name).exists():
            return (
                f"{package.parent} is a source folder without compiled kernels, and it hides the installed {other}: "
                "start Python in another folder, or build the kernels here with `pip install -e .`"
            )
    return (
        f"the compiled kernels are missing ({_LIBRARY}): build them with `pip install .` or `pip install -e .` "
        "in the source folder"
    )


if not _LIBRARY.exists():
    raise ImportError(_missing())
torch.ops.load_library(str(_LIBRARY))
if tuple(int(part) for part in torch.__version__.split(".")[:2]) > NEWEST_TESTED:
    warnings.warn(
        f"pspnet_fast was tested with torch 2.11 to {'.'.join(map(str, NEWEST_TESTED))}, not with {torch.__version__}. "
        "Its kernels need torch's stable ABI alone and should work; what it does in Python may not",
        stacklevel=2,
    )

_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")


def transforms_active() -> bool:
    """Whether tensors may carry tangents (forward-mode AD) or stand for others (torch.func: grad, vmap, jvp, ...)."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record the compiled operator, which does not run on these tensors under a transform."""
    if not torch.is_grad_enabled() or transforms_active():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def run_plain(plain: Callable[..., Any], *args: Any) -> Any:
    """plain(*args), where autocast shall not choose the dtypes."""
    with torch.autocast(next(t for t in args if isinstance(t, Tensor)).device.type, enabled=False):
        return plain(*args)


Written = Callable[..., Iterable[Tensor]]  # of an operator's arguments: the tensors that the call writes into


def register_derivatives(
    name: str,
    plain: Callable[..., Any],
    recorded: Callable[..., Any] | None = None,
    *,
    mutated: int | Written | None = None,
) -> None:
    """Registers what autograd, forward-mode AD and the transforms of torch.func run in place of an operator.

    The kernels know none of these. Under a transform the operator is therefore `plain`, operations of torch that each
    of them sees through, in any nesting. Being below the tracers, this holds in eager mode and under torch.compile.

    torch.func lets an operator write only into tensors that it has seen being made, but does not tell us which these
    are. One that mutates is refused here under torch.func; its wrapper calls `plain` itself, which torch checks.

    Args:
        name: of the operator.
        plain: the same in operations of torch, with the operator's arguments.
        recorded: called where reverse mode has to record the operator, by a torch.autograd.Function; `plain` by
            default, which the backward operators take: backward meets it where it is recorded itself
            (create_graph=True), so that derivatives of every order are right.
        mutated: what the operator writes into, if anything: the number of the argument, or a function of the arguments.
    """
    overload = getattr(torch.ops.pspnet_fast, name).default

    def autograd(*args: Any) -> Any:
        if transforms_active():
            return transformed(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return recorded(*args) if recorded else run_plain(plain, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def transformed(*args: Any) -> Any:
        written = [] if mutated is None else _written(mutated, args)
        if written and torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError(
                f"torch.ops.pspnet_fast.{name} writes in place, which the transforms of torch.func (grad, vmap, jvp, "
                f"...) do not see: call pspnet_fast.ops.{name}"
            )
        return run_plain(plain, *args)

    _fragment.impl(name, autograd, "Autograd")
    register_batching(name, transformed)
    if mutated is not None:
        register_inplace(name, mutated=mutated)


def register_inplace(name: str, *, mutated: int | Written) -> None:
    """Registers what torch's own operators do with what they write into: argument number `mutated`, or its result.

    They count up their versions, so that autograd notices, and refuse an inference tensor outside inference mode: it
    has no version.
    """
    overload = getattr(torch.ops.pspnet_fast, name).default

    def bump_version(keyset: Any, *args: Any) -> Any:
        for tensor in _written(mutated, args):
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{name}: {_name_of(tensor, overload, args)} is an inference tensor, which is written to in "
                    "inference mode only: clone() it for an ordinary tensor"
                )
            torch.autograd.graph.increment_version(tensor)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _fragment.impl(name, bump_version, "ADInplaceOrView", with_keyset=True)


def _written(mutated: int | Written, args: Any) -> list[Tensor]:
    if isinstance(mutated, int):
        return [] if args[mutated] is None else [args[mutated]]
    return list(mutated(*args))


def _name_of(tensor: Tensor, overload: Any, args: Any) -> str:
    """The argument that is a tensor, or lists it."""
    for argument, value in zip(overload._schema.arguments, args, strict=False):
        if any(t is tensor for t in (value if isinstance(value, (list, tuple)) else [value])):
            return str(argument.name)
    return "an argument"


def register_batching(name: str, plain: Callable[..., Any]) -> None:
    """Registers what vmap runs in place of an operator, as operations of torch that it sees through."""
    _fragment.impl(name, plain, "FuncTorchBatched")
    if "Tensor[]" in str(getattr(torch.ops.pspnet_fast, name).default._schema):
        _fragment.impl(name, plain, "Batched")  # is_grads_batched=True loops over the others by itself


def register_fallback(name: str, plain: Callable[..., Any]) -> None:
    """Registers what an operator runs on devices that it has no kernels for: MPS, XPU, CUDA or ROCm without a build."""
    _fragment.impl(name, plain, "CompositeExplicitAutograd")
