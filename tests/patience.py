"""Processes that end by themselves on a machine however busy, and that are ended where they hang."""

import os
import signal
import subprocess
import time
from pathlib import Path

IDLE = 600.0  # seconds without a sign of work, after which it waits for what never comes


def run_patiently(command: list[str], cpu_seconds: float, idle: float = IDLE, **options) -> subprocess.CompletedProcess:
    """subprocess.run with captured text, ended with SIGKILL where it hangs; stderr then says why.

    A busy machine gives a process little time but some, so what counts is processor time, of the process and what it
    started: more than `cpu_seconds` is an endless loop, and less than a hundredth of a second more in `idle` seconds is
    a deadlock.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, **options)
    used, since, reason = 0.0, time.monotonic(), ""
    while True:
        try:
            stdout, stderr = process.communicate(timeout=min(1.0, idle))
            return subprocess.CompletedProcess(command, process.returncode, stdout, stderr + reason)
        except subprocess.TimeoutExpired:
            now = _processor_time(process.pid)
            if now > used + 0.01:
                used, since = now, time.monotonic()
            if now > cpu_seconds:
                reason = f"\nended after {now:.0f} s of processor time"
            elif time.monotonic() - since > idle:
                reason = f"\nended after {idle:.0f} s without work"
            if reason:
                os.killpg(process.pid, signal.SIGKILL)


def _processor_time(session: int) -> float:
    """Seconds that the processes of a session have used, those that have ended included."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
