"""Loads the compiled operators and registers what torch needs to know of them from Python."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "pspnet_fast"
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

_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")


def register_inplace_autograd(name: str, autograd: Callable[..., Any], *, mutated: int) -> None:
    """Registers the Autograd kernel of an operator that writes into its argument number `mutated`.

    torch.library.register_autograd takes functional operators only, so the dispatcher gets the kernel directly. Being
    below the tracers, it serves eager mode, torch.compile and torch.export alike.
    """
    overload = getattr(torch.ops.pspnet_fast, name).default

    def bump_version(keyset: Any, *args: Any) -> Any:
        if args[mutated] is not None:
            torch.autograd.graph.increment_version(args[mutated])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _fragment.impl(name, autograd, "Autograd")
    _fragment.impl(name, bump_version, "ADInplaceOrView", with_keyset=True)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
