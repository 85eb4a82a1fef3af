"""What the benchmarks compare: cases, the times of their implementations, and the floor that the machine sets."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ParamSpec, TypeVar

import torch
from timing import host_seconds, product_rate, synchronized
from torch import Tensor

import pspnet_fast  # noqa: F401  (loads the operators)

P, T = ParamSpec("P"), TypeVar("T")
LAYOUTS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # CUDA_VISIBLE_DEVICES= for the CPU beside a GPU
# torch.compile of each operator's reference takes minutes: on a GPU only, where it is the usual way to fuse them
IMPLEMENTATIONS = ["eager", "compile", "fused"] if DEVICE.type == "cuda" else ["eager", "fused"]
COPY_BYTES = {"cpu": 59 << 20, "cuda": 1 << 30}  # beyond the caches; on the CPU as much as FusedPPM writes at 60 x 60


@dataclass(frozen=True)
class Case:
    """A feature map (N, C, H, W) of one dtype and memory format."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    memory_format: torch.memory_format

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{'x'.join(map(str, self.shape))} {dtype} {LAYOUTS[self.memory_format]}"

    def random_map(self, device: torch.device, channels: int | None = None) -> Tensor:
        """(N, C, H, W), or other channels than C."""
        n, c, h, w = self.shape
        size = (n, channels or c, h, w)
        return torch.empty(size, dtype=self.dtype, device=device, memory_format=self.memory_format).normal_()


def cases(*shapes: tuple[int, int, int, int]) -> list[Case]:
    """The shapes in both dtypes and both memory formats; on a GPU, those of batch 1 with a batch of 16 as well."""
    dtypes = (torch.float32, torch.bfloat16)
    if DEVICE.type == "cuda":
        shapes += tuple((16, *shape[1:]) for shape in shapes if shape[0] == 1)
    return [Case(shape, dtype, layout) for shape in shapes for dtype in dtypes for layout in LAYOUTS]


def chosen(implementation: str, eager: Callable[P, T], fused: Callable[P, T]) -> Callable[P, T]:
    """The function of an implementation, one of IMPLEMENTATIONS."""
    return {"eager": eager, "compile": torch.compile(eager, dynamic=False), "fused": fused}[implementation]


def nbytes(*tensors: Tensor) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


class CopyBandwidth:
    """Bytes a second, read and written together, of torch's copy_ on one device: the best seen, by kind of memory.

    Ordinary pages are what a fresh tensor has. Copies between huge pages, where the system offers them, come closest
    to what the memory can do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, size = device, COPY_BYTES[device.type]
        self.buffers = {"ordinary pages": [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2)]}
        if device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
            self.buffers["huge pages"] = [_huge_pages(size).fill_(1) for _ in range(2)]
        self.best = dict.fromkeys(self.buffers, 0.0)

    def measure(self) -> None:
        """Copies a few times; the machine's other work comes and goes, so this is called all along a run."""
        for kind, (source, target) in self.buffers.items():
            copy = synchronized(partial(target.copy_, source), self.device)
            for _ in range(5):
                self.best[kind] = max(self.best[kind], 2 * nbytes(source) / host_seconds(copy))

    def ceiling(self) -> float:
        """The greatest, of which the floors are made."""
        return max(self.best.values())


def _huge_pages(size: int) -> Tensor:
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


@dataclass(frozen=True)
class Comparison:
    """Where a time belongs, and what it is held against.

    Args:
        table: the title of its table.
        case: its row.
        floor_bytes: what has to be read and written once, at least.
        target: how many times faster than eager the fused implementation is meant to be.
        operations: additions and multiplications of its matrix products.
        dtype: of these products.
    """

    table: str
    case: str
    floor_bytes: int
    target: float | None = None
    operations: int = 0
    dtype: torch.dtype = torch.float32


@dataclass
class Results:
    """Everything measured in one run."""

    times: dict[Comparison, dict[str, list[float]]] = field(default_factory=dict)  # seconds of each run; NaN: it fails
    memory: dict[str, dict[str, float]] = field(default_factory=dict)  # bytes, by case and implementation
    rates: dict[torch.dtype, float] = field(default_factory=dict)  # operations a second of matrix products

    @cached_property
    def bandwidth(self) -> CopyBandwidth:
        return CopyBandwidth(DEVICE)

    def add(self, comparison: Comparison, implementation: str, times: list[float]) -> None:
        self.times.setdefault(comparison, {})[implementation] = times

    def floor(self, comparison: Comparison) -> float:
        """The seconds that this machine's copies and matrix products would take for what has to be done."""
        seconds = comparison.floor_bytes / self.bandwidth.ceiling()
        if not comparison.operations:
            return seconds
        if comparison.dtype not in self.rates:
            self.rates[comparison.dtype] = product_rate(DEVICE, comparison.dtype)
        return max(seconds, comparison.operations / self.rates[comparison.dtype])
