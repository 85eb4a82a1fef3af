"""The CUDA sources executed on the CPU, in thread orders and under sanitizers (tests/cuda_on_cpu/README.md)."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cuda_on_cpu"
sys.path.insert(0, str(HERE))
import backend  # noqa: E402

if platform.machine() != "x86_64":
    pytest.skip("the CUDA sources run on x86-64 only", allow_module_level=True)
try:
    backend.cuda_include()
except backend.NotAvailable as error:
    pytest.skip(f"the CUDA sources cannot be built: {error}", allow_module_level=True)

# mode -> (sanitizer, what the runtime is told)
MODES = {
    "forward": ("none", {}),
    "reverse": ("none", {"CUDA_ON_CPU_ORDER": "reverse"}),
    "random": ("none", {"CUDA_ON_CPU_ORDER": "random:1"}),
    "address": ("address", {}),
    "thread": ("thread", {}),
    "blocks": ("thread", {"CUDA_ON_CPU_BLOCKS": "unordered"}),
}
RACE, OVERFLOW = "ThreadSanitizer: data race", "AddressSanitizer: heap-buffer-overflow"
# The bugs of planted_bugs.cu, by number: which modes must find each, and what they say.
PLANTED = [
    ("no barrier after the table", {"forward": "wrong result", "reverse": "wrong result", "thread": RACE}),
    ("no barrier before the total", {"forward": "wrong result", "thread": RACE}),
    ("no barrier at the loop's end", {"thread": RACE, "blocks": RACE}),
    ("device store to shared memory", {mode: "goes to shared memory" for mode in MODES}),
    ("read past shared memory", {"address": OVERFLOW}),
    ("write past the output", {"address": OVERFLOW}),
    ("blocks share a word", {"blocks": RACE}),
    ("divergent barrier", {"forward": "others wait at the barrier", "address": "others wait at the barrier"}),
    ("shuffle in half a warp", {"forward": "its warp waits at", "reverse": "deadlock", "thread": "its warp waits at"}),
    ("misaligned vector", {"address": "misaligned address"}),
]


def run(mode: str, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    sanitizer, settings = MODES[mode]
    # The sanitizers' fixed addresses do not bear the widest randomisation of the address space.
    fixed = ["setarch", "-R"] if sanitizer != "none" and shutil.which("setarch") else []
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0"}  # leaks: Python's
    environment = {**os.environ, **options, **settings, **more}
    return subprocess.run([*fixed, *command], capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_without_a_bug_passes(mode):
    done = run(mode, [str(backend.build_planted_bugs(MODES[mode][0])), "0"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", range(1, len(PLANTED) + 1), ids=[name for name, _ in PLANTED])
def test_planted_bug_is_found(number):
    for mode, message in PLANTED[number - 1][1].items():
        done = run(mode, [str(backend.build_planted_bugs(MODES[mode][0])), str(number)])
        assert done.returncode != 0, f"not found in mode {mode}"
        assert re.search(message, done.stderr), f"{mode}: {done.stderr}"


# (random calls of each kernel, pixels of an image at most): as many as a minute allows in the mode
CALLS = {
    "forward": (40, 6000),
    "reverse": (40, 200),
    "random": (40, 200),
    "address": (15, 200),
    "thread": (12, 60),
    "blocks": (8, 60),
}


@pytest.mark.parametrize("mode", MODES)
def test_kernels(mode):
    """Random calls of every kernel, outputs at odd addresses among them, right and free of reports in each mode."""
    sanitizer, (calls, largest) = MODES[mode][0], CALLS[mode]
    backend.build_operators(sanitizer)
    command = [sys.executable, str(HERE / "contract.py"), f"--cases={calls}", f"--largest={largest}"]
    done = run(
        mode,
        [*command, f"--sanitizer={sanitizer}"],
        LD_PRELOAD=backend.preload(sanitizer),
        PYTHONPATH=os.pathsep.join([str(backend.ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
