"""A tensor that keeps notes, as MONAI's MetaTensor and fastai's TensorImage do."""

from typing import Any

import torch
from torch import Tensor


class Noted(Tensor):
    """Every function of torch gives a Noted with the notes of its first Noted argument."""

    notes: dict[str, Any]

    @staticmethod
    def of(tensor: Tensor, **notes: Any) -> "Noted":
        noted: Any = tensor.as_subclass(Noted)
        noted.notes = notes
        return noted

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        for part in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(part, Noted) and not hasattr(part, "notes"):
                part.notes = next((a.notes for a in flat if isinstance(a, Noted) and hasattr(a, "notes")), {})
        return result


def notes_of(tensor: Tensor) -> dict[str, Any]:
    assert isinstance(tensor, Noted)
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.notes
