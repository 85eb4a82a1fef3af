"""What a run of the benchmarks measured, as JSON: benchmarks/results/ keeps such files of machines with a GPU."""

import datetime
import math
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from comparison import DEVICE, Comparison, Results


def record(results: Results) -> dict[str, Any]:
    """Machine, versions, rates and all rows, of numbers, strings, lists and dictionaries; times in seconds."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for comparison, times in results.times.items():
        tables.setdefault(comparison.table, []).append(_row(results, comparison, times))
    return {
        "machine": machine(),
        "copy_bytes_per_second": results.bandwidth.best if results.times else {},
        "operations_per_second": {str(d).removeprefix("torch."): rate for d, rate in results.rates.items()},
        "tables": tables,
        "memory": results.memory,
    }


def machine() -> dict[str, Any]:
    gpu = DEVICE.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.ops.pspnet_fast.cpu_instruction_set(),
        # decides whether large outputs are fresh memory, which the system has to clear first
        "glibc": os.environ.get("GLIBC_TUNABLES", "the defaults"),
    }


def _processor() -> str:
    try:
        from cpuinfo import get_cpu_info  # comes with pytest-benchmark
    except ImportError:
        return platform.machine()
    return get_cpu_info().get("brand_raw", platform.machine())


def _row(results: Results, comparison: Comparison, times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "case": comparison.case,
        "target": comparison.target,
        "floor": results.floor(comparison),
        "seconds": {name: _summary(seconds) for name, seconds in times.items()},
    }


def _summary(times: list[float]) -> dict[str, float] | None:
    """Median and quantiles of the runs; None: the implementation fails."""
    if any(map(math.isnan, times)):
        return None
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"runs": len(times), "median": statistics.median(times), "q10": tenths[0], "q90": tenths[-1]}


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0]
