"""Loads the compiled operators and registers what torch needs to know of them from Python."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "pspnet_fast"
_LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"

if not _LIBRARY.exists():
    raise ImportError(
        f"the compiled kernels are missing ({_LIBRARY}): build them with `pip install .` or `pip install -e .` "
        "in the source folder"
    )
torch.ops.load_library(str(_LIBRARY))

_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")


def register_inplace_autograd(name: str, autograd: Callable[..., Any], *, mutated: int) -> None:
    """Registers the Autograd kernel of an operator that writes into its argument number `mutated`.

    torch.library.register_autograd takes functional operators only, so the dispatcher gets the kernel directly. Being
    below the tracers, it serves eager mode, torch.compile and torch.export alike.
    """
    _fragment.impl(name, autograd, "Autograd")
    register_inplace(name, mutated=mutated)


def register_inplace(name: str, *, mutated: int) -> None:
    """Registers what torch's own operators do with an argument that they write into: argument number `mutated`.

    They count up its version, so that autograd notices, and refuse an inference tensor outside inference mode: it has
    no version.
    """
    overload = getattr(torch.ops.pspnet_fast, name).default

    def bump_version(keyset: Any, *args: Any) -> Any:
        written = args[mutated]
        if written is not None:
            if written.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{name}: {overload._schema.arguments[mutated].name} is an inference tensor, which is written to "
                    "in inference mode only: clone() it for an ordinary tensor"
                )
            torch.autograd.graph.increment_version(written)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _fragment.impl(name, bump_version, "ADInplaceOrView", with_keyset=True)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
