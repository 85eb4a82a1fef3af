"""Times of a function on a device, and the rates of its copies and matrix products."""

import mmap
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

FLUSHED_BYTES = 1 << 30  # more than any GPU's L2 cache holds, and some tenths of a millisecond of work
COPY_BYTES = {"cpu": 59 << 20, "cuda": 1 << 30}  # beyond the caches; on the CPU as much as FusedPPM writes at 60 x 60
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}


def nothing() -> None:
    """No preparation."""


def synchronized(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The function, returning when the device is done."""
    if device.type == "cpu":
        return function

    def run() -> object:
        result = function()
        torch.cuda.synchronize(device)
        return result

    return run


def host_seconds(function: Callable[[], object], setup: Callable[[], None] = nothing) -> float:
    """The time of one call by the host's clock."""
    setup()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Stopwatch:
    """Times of single calls, by the host's clock on a CPU, by the GPU's own on a GPU.

    There each call finds an L2 cache that holds none of its memory. The writing that empties the cache keeps the GPU
    busy until the host has queued the call, so that launches are not waited for: what a CUDA graph of the call would
    take. The host's own time is operator_calls.py's.
    """

    def __init__(self, function: Callable[[], object], setup: Callable[[], None], device: torch.device) -> None:
        self._function, self._setup, self._device = function, setup, device
        self._seconds: list[float] = []
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if device.type == "cuda":
            self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
            flushing = min(host_seconds(synchronized(self._flushed.zero_, device)) for _ in range(2))
            queueing = min(host_seconds(function, setup) for _ in range(3))
            torch.cuda.synchronize(device)
            self._flushes = 1 + int(1.5 * queueing / flushing)

    def run(self) -> None:
        """One call; on a GPU it is only queued."""
        if self._device.type == "cpu":
            self._seconds.append(host_seconds(self._function, self._setup))
            return
        self._setup()
        for _ in range(self._flushes):
            self._flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._function()
        end.record()
        self._marks.append((start, end))

    def seconds(self) -> list[float]:
        """Of all calls so far."""
        if self._marks:
            torch.cuda.synchronize(self._device)
            self._seconds += [start.elapsed_time(end) / 1e3 for start, end in self._marks]  # of milliseconds
            self._marks = []
        return self._seconds


def gpu_seconds(
    function: Callable[[], object], setup: Callable[[], None], device: torch.device, rounds: int
) -> list[float]:
    """The times of so many calls by the GPU's clock: see Stopwatch."""
    watch = Stopwatch(function, setup, device)
    for _ in range(rounds):
        watch.run()
    return watch.seconds()


class Machine:
    """Bytes and operations a second that torch's copy_ and matrix products reach on one device: the best seen.

    They are measured all along a run, since the machine's other work comes and goes. Bytes are those read and those
    written. Ordinary pages are what a fresh tensor has. Copies between huge pages, where the system offers them, come
    closest to what the memory can do. Float32 products on a GPU use TF32 where cuDNN's convolutions may.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, size = device, COPY_BYTES[device.type]
        self._buffers = {"ordinary pages": [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2)]}
        if device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
            self._buffers["huge pages"] = [_huge_pages(size).fill_(1) for _ in range(2)]
        self._factors: dict[torch.dtype, list[Tensor]] = {}
        self.copies = dict.fromkeys(self._buffers, 0.0)
        self.products: dict[torch.dtype, float] = {}
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32

    def measure(self, dtype: torch.dtype) -> tuple[float, float]:
        """The seconds of a copy and of a product of matrices of a dtype, now."""
        seconds = 0.0
        for kind, (source, target) in self._buffers.items():
            seconds = host_seconds(synchronized(partial(target.copy_, source), self._device))
            self.copies[kind] = max(self.copies[kind], 2 * source.numel() / seconds)
        size = PRODUCT_SIZE[self._device.type]
        if dtype not in self._factors:
            self._factors[dtype] = [torch.randn(size, size, device=self._device).to(dtype) for _ in range(2)]
            synchronized(lambda: torch.mm(*self._factors[dtype]), self._device)()
        product = host_seconds(synchronized(lambda: torch.mm(*self._factors[dtype]), self._device))
        self.products[dtype] = max(self.products.get(dtype, 0.0), 2 * size**3 / product)
        return seconds, product

    def floor(self, floor_bytes: int, operations: int, dtype: torch.dtype) -> float:
        """The seconds that the best copies and products of this run take for so many bytes and operations."""
        bytes_alone = floor_bytes / max(self.copies.values())
        return max(bytes_alone, operations / self.product_rate(dtype)) if operations else bytes_alone

    def product_rate(self, dtype: torch.dtype) -> float:
        """Operations a second in a dtype, or in float32 where that is faster, as on a CPU without bfloat16."""
        return max(self.products[dtype], self.products.get(torch.float32, 0.0))


def _huge_pages(size: int) -> Tensor:
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
