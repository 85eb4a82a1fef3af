"""Every call of an operator made twice, whatever the test that makes it: the bits must be the same."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Twice(TorchDispatchMode):
    """Calls each operator of a namespace a second time on the same memory and compares results and what it wrote."""

    FRESH = ("new_concat",)  # return memory that they leave as it was

    def __init__(self, namespace: str = "pspnet_fast") -> None:
        super().__init__()
        self.namespace = namespace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != self.namespace or func._opname in self.FRESH:
            return func(*args, **(kwargs or {}))
        schema = func._schema.arguments
        named = dict(zip((argument.name for argument in schema), args, strict=False)) | (kwargs or {})
        writes = (named.get(argument.name) for argument in schema if argument.is_write)
        written = [t for value in writes for t in tree_leaves(value) if isinstance(t, Tensor)]
        before = [t.clone() for t in written]
        results = func(*args, **(kwargs or {}))
        first = [_bits(t) for t in tree_leaves(results) if isinstance(t, Tensor)] + [_bits(t) for t in written]
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(written)):
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(old)
            results = func(*args, **(kwargs or {}))
        second = [_bits(t) for t in tree_leaves(results) if isinstance(t, Tensor)] + [_bits(t) for t in written]
        assert all(map(torch.equal, first, second)), f"{func} gave other bits when called again"
        return results


def _bits(tensor: Tensor) -> Tensor:
    """A copy of a tensor's memory in which NaN equals NaN."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(integers[tensor.element_size()])
