"""The resident set of this process, as Linux keeps it."""

from pathlib import Path


def resident(field: str) -> int:
    """VmRSS, what it is now, or VmHWM, the most that it was; bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
