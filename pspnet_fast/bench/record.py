"""What a run measured, as JSON, and the machine that it ran on: no name of a host, no path."""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pspnet_fast
from pspnet_fast.files import replacing


def machine(device: torch.device) -> dict[str, Any]:
    """Date, commit, versions, processor and GPU."""
    gpu = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"),
        "pspnet_fast": pspnet_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.ops.pspnet_fast.cpu_instruction_set(),
        # decides whether large outputs are fresh memory, which the system has to clear first
        "glibc": os.environ.get("GLIBC_TUNABLES", "the defaults"),
    }


def processor() -> str:
    """Its name as it calls itself, or the architecture."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and quantiles of runs."""
    parts = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else list(times) * 19
    return {
        "runs": len(times), "median": statistics.median(times),
        "q10": parts[1], "q25": parts[4], "q75": parts[14], "q90": parts[17],
    }  # fmt: skip


def write(record: dict[str, Any], path: Path) -> None:
    """Raises OSError naming the file if it cannot be written."""
    with replacing(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        ValueError: it is another kind of file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(record, dict) or not {"machine", "cases"} <= record.keys():
        raise ValueError(f"{path} is no record of pspnet-fast bench: it has no machine or no cases")
    return record


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it fails."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0]
