"""Activation checkpointing that leaves batch norms' running statistics as one forward makes them."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pspnet_fast.models.resnet import BasicBlock, Bottleneck


def recomputed(layer: nn.Module, input: Tensor) -> Tensor:
    """``layer(input)``, of which the backward pass computes the activations again: block by block where it has blocks.

    A layer must not depend on random numbers.
    """
    parts = list(layer) if isinstance(layer, nn.Sequential) else []
    blocks = parts if parts and all(isinstance(part, BasicBlock | Bottleneck) for part in parts) else [layer]
    for block in blocks:
        contexts = functools.partial(_contexts, block)
        input = checkpoint(block, input, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return input


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _without_tracking(block)


@contextmanager
def _without_tracking(block: nn.Module) -> Iterator[None]:
    norms = [norm for norm in block.modules() if isinstance(norm, _BatchNorm)]
    buffers = [norm._buffers for norm in norms]
    for norm in norms:  # on copies, which are thrown away
        norm._buffers = {name: value if value is None else value.clone() for name, value in norm._buffers.items()}
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            norm._buffers = own
