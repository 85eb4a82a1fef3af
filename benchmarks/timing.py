"""Times of a function on a device, and the rate of its matrix products."""

import time
from collections.abc import Callable

import torch

FLUSHED_BYTES = 1 << 30  # more than any GPU's L2 cache holds, and some tenths of a millisecond of work
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def synchronized(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The function, returning when the device is done."""
    if device.type == "cpu":
        return function

    def run() -> object:
        result = function()
        torch.cuda.synchronize(device)
        return result

    return run


def host_seconds(function: Callable[[], object], setup: Callable[[], None] = lambda: None) -> float:
    """The time of one call by the host's clock."""
    setup()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def gpu_seconds(
    function: Callable[[], object], setup: Callable[[], None], device: torch.device, rounds: int
) -> list[float]:
    """The times of calls by the GPU's clock, each with an L2 cache that holds none of its memory.

    The writing that empties the cache keeps the GPU busy until the host has queued the call, so that launches are not
    waited for: what a CUDA graph of the call would take. The host's own time is operator_calls.py's.
    """
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    flushing = host_seconds(synchronized(flushed.zero_, device))
    torch.cuda.synchronize(device)
    queueing = min(host_seconds(function, setup) for _ in range(3))
    torch.cuda.synchronize(device)
    flushes = 1 + int(1.5 * queueing / min(flushing, host_seconds(synchronized(flushed.zero_, device))))
    marks = []
    for _ in range(rounds):
        setup()
        for _ in range(flushes):
            flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in marks]  # of milliseconds


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Additions and multiplications a second of a large matrix product: the best of ten.

    In float32 on a GPU with TF32 where cuDNN's convolutions may use it.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = synchronized(lambda: a @ b, device)
    product()
    return 2 * size**3 / min(host_seconds(product) for _ in range(10))
