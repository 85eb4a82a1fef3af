"""Hanging processes are ended, slow ones are not."""

import sys

import pytest
from patience import run_patiently

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads processor times from /proc")


def python(code: str, **limits: float):
    return run_patiently([sys.executable, "-c", code], **limits)


def test_a_process_that_ends_keeps_its_output_and_status():
    done = python("import sys; print('x' * 10**6); print('told', file=sys.stderr); sys.exit(3)", cpu_seconds=600)
    assert (done.returncode, done.stdout, done.stderr) == (3, "x" * 10**6 + "\n", "told\n")


def test_one_that_waits_but_works_between_is_not_ended():
    code = "import time\nfor _ in range(8): time.sleep(0.2); sum(range(10**6))"
    assert python(code, cpu_seconds=600, idle=60).returncode == 0


@pytest.mark.parametrize(
    ("code", "limits", "reason"),
    [
        ("while True: pass", {"cpu_seconds": 0.5}, "s of processor time"),
        ("import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])", {"cpu_seconds": 0.5},
         "s of processor time"),
        ("import threading; threading.Lock().acquire(); threading.Event().wait()",
         {"cpu_seconds": 600, "idle": 2}, "ended after 2 s without work"),
    ],
)  # fmt: skip
def test_one_that_hangs_is_ended(code, limits, reason):
    done = python(code, **limits)
    assert done.returncode == -9
    assert reason in done.stderr
