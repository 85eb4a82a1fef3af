"""keep_memory: how much memory of freed outputs the CPU kernels keep for the next ones."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_keep_memory = torch.ops.pspnet_fast.keep_memory.default
MOST = 1 << 20


def keep_memory(megabytes: int) -> int:
    """Bound what is kept of freed outputs on the CPU, and give back at once what lies beyond.

    Fresh memory of a large output costs more time than what is written into it, so blocks of 8 MB and more are kept for
    the next ones: 256 MB at most, or the environment's PSPNET_FAST_KEEP_MB, while no tensor uses them. Where a step of
    a whole network takes seconds, that time is nothing and the memory counts: :func:`pspnet_fast.training.fit` keeps
    none.

    Args:
        megabytes: of 2^20 bytes, 0 (nothing is kept) to 2^20. For the whole process.

    Returns:
        The bound before.

    Raises:
        TypeError, ValueError: no int, or outside its range.
    """
    if not isinstance(megabytes, int) or isinstance(megabytes, bool):
        raise TypeError(f"megabytes must be an int, but is {megabytes!r}")
    if not 0 <= megabytes <= MOST:
        raise ValueError(f"megabytes must be from 0 to {MOST}, but is {megabytes}")
    before: int = _keep_memory(megabytes)
    return before


@contextmanager
def nothing_kept() -> Iterator[None]:
    """No memory is kept while the context is open, unless the environment says how much."""
    if "PSPNET_FAST_KEEP_MB" in os.environ:
        yield
        return
    before = keep_memory(0)
    try:
        yield
    finally:
        keep_memory(before)
