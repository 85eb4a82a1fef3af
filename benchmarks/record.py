"""What a run of the benchmarks measured, as JSON: benchmarks/results/ keeps such files of machines with a GPU."""

import datetime
import json
import math
import statistics
import subprocess
from pathlib import Path

import torch
from comparison import Comparison, Results


def as_json(results: Results) -> str:
    rows = [_row(results, comparison) for comparison in results.times]
    machine = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"),
        "date": datetime.date.today().isoformat(),
    }
    ceilings = {
        "copy_bytes_per_second": {str(device): b.ceiling() for device, b in results.bandwidths.items()},
        "bfloat16_operations_per_second": {str(device): rate for device, rate in results.rates.items()},
    }
    return json.dumps(machine | ceilings | {"rows": rows}, indent=1)


def _row(results: Results, comparison: Comparison) -> dict[str, object]:
    return {
        "table": comparison.table,
        "case": comparison.case,
        "device": comparison.device.type,
        "floor_seconds": results.floor(comparison),
        "seconds": {name: _summary(times) for name, times in results.times[comparison].items()},
    }


def _summary(times: list[float]) -> dict[str, float] | None:
    """Median and quantiles of the runs; None: the implementation fails."""
    if any(map(math.isnan, times)):
        return None
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"runs": len(times), "median": statistics.median(times), "q10": tenths[0], "q90": tenths[-1]}


def _output(*command: str) -> str | None:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0]
