"""What the benchmarks compare: cases, the floor that memory bandwidth sets, and the tables made of the times."""

import math
import mmap
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import cpuinfo
import torch
from timing import bfloat16_rate, host_seconds, synchronized
from torch import Tensor

import pspnet_fast  # noqa: F401  (loads the operators)

LAYOUTS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}
TIMES = ["case", "eager ms", "compile ms", "fused ms", "eager / fused", "floor ms", "fused / floor", "target"]
# torch.compile of each operator's reference takes minutes: on a GPU only, where it is the usual way to fuse them
IMPLEMENTATIONS = ["eager", "compile", "fused"] if torch.cuda.is_available() else ["eager", "fused"]
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
    """The shapes in both dtypes and both memory formats."""
    dtypes = (torch.float32, torch.bfloat16)
    return [Case(shape, dtype, layout) for shape in shapes for dtype in dtypes for layout in LAYOUTS]


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
        bfloat16_operations: additions and multiplications of its matrix products, if they are in bfloat16.
    """

    table: str
    case: str
    device: torch.device
    floor_bytes: int
    target: float | None = None
    bfloat16_operations: float = 0


@dataclass
class Results:
    """Everything measured in one run."""

    times: dict[Comparison, dict[str, list[float]]] = field(default_factory=dict)  # seconds of each run; NaN: it fails
    memory: dict[str, dict[str, float]] = field(default_factory=dict)  # bytes, by case and implementation
    bandwidths: dict[torch.device, CopyBandwidth] = field(default_factory=dict)
    rates: dict[torch.device, float] = field(default_factory=dict)  # of matrix products, see timing.bfloat16_rate

    def bandwidth(self, device: torch.device) -> CopyBandwidth:
        """The copies of a device, made at their first use."""
        if device not in self.bandwidths:
            self.bandwidths[device] = CopyBandwidth(device)
        return self.bandwidths[device]

    def add(self, comparison: Comparison, implementation: str, times: list[float]) -> None:
        self.times.setdefault(comparison, {})[implementation] = times

    def floor(self, comparison: Comparison) -> float:
        """The seconds that this device's copies and matrix products would take for what has to be done."""
        seconds = comparison.floor_bytes / self.bandwidth(comparison.device).ceiling()
        if comparison.bfloat16_operations == 0:
            return seconds
        if comparison.device not in self.rates:
            self.rates[comparison.device] = bfloat16_rate(comparison.device)
        return max(seconds, comparison.bfloat16_operations / self.rates[comparison.device])

    def report(self) -> str:
        """All tables, in Markdown."""
        parts = [self._machine()]
        for table in dict.fromkeys(comparison.table for comparison in self.times):
            rows = [self._row(comparison) for comparison in self.times if comparison.table == table]
            header = [
                "case",
                "eager ms",
                "compile ms",
                "fused ms",
                "eager / fused",
                "floor ms",
                "fused / floor",
                "target",
            ]
            parts.append(f"{table}\n\n{_markdown(header, rows)}")
        if self.memory:
            rows = [
                [case, *(f"{by[name] / 1e6:.1f}" for name in ("eager", "fused"))] for case, by in self.memory.items()
            ]
            title = "Peak memory of the forward pass beyond input and output (target: 5 MB)"
            parts.append(f"{title}\n\n{_markdown(['case', 'eager MB', 'fused MB'], rows)}")
        return "\n\n".join(parts)

    def _machine(self) -> str:
        processor = cpuinfo.get_cpu_info().get("brand_raw", "unknown processor")
        kernels = torch.ops.pspnet_fast.cpu_instruction_set()
        lines = [
            f"{processor}, {torch.get_num_threads()} threads, kernels for {kernels}, torch {torch.__version__}.",
            # decides whether large outputs are fresh memory, which the system has to clear first
            f"glibc's memory settings: {os.environ.get('GLIBC_TUNABLES', 'the defaults')}.",
        ]
        for device, bandwidth in self.bandwidths.items():
            size = COPY_BYTES[device.type] >> 20
            name = f" on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
            speeds = ", ".join(f"{best / 1e9:.1f} GB/s in {kind}" for kind, best in bandwidth.best.items())
            lines.append(
                f"copy_ of {size} MiB{name}, read + written, best of this run: {speeds}; floors use the greatest."
            )
        return "\n".join(lines)

    def _row(self, comparison: Comparison) -> list[str]:
        seconds = {name: statistics.median(times) for name, times in self.times[comparison].items()}
        floor = self.floor(comparison)
        eager, fused = seconds.get("eager"), seconds.get("fused")
        times = [_milliseconds(seconds.get(name)) for name in ("eager", "compile", "fused")]
        ratio = eager / fused if eager and fused else None
        verdict = ""
        if ratio and comparison.target:
            verdict = f"{comparison.target:g}x {'met' if ratio >= comparison.target else 'missed'}"
        return [
            f"{comparison.case} cuda" if comparison.device.type == "cuda" else comparison.case,
            *times,
            f"{ratio:.1f}" if ratio else "",
            f"{floor * 1e3:.2f}",
            f"{fused / floor:.1f}" if fused else "",
            verdict,
        ]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else "fails" if math.isnan(seconds) else f"{seconds * 1e3:.2f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows]
    cells = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
