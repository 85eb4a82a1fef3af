"""The CUDA sources executed on the CPU, in thread orders and under sanitizers (tests/cuda_on_cpu/README.md)."""

import os
import re
import shutil
import subprocess
import sys

import cases
import pytest
from cuda_on_cpu import backend
from patience import run_patiently

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
CPU_SECONDS = 3600  # of a process, some ten times what the longest takes; deadlocks of threads show at once
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
    ("copy not waited for", {mode: "wrong result" for mode in ("forward", "reverse", "thread")}),
]


def run(mode: str, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    sanitizer, settings = MODES[mode]
    # The sanitizers' fixed addresses do not bear the widest randomisation of the address space.
    fixed = ["setarch", "-R"] if sanitizer != "none" and shutil.which("setarch") else []
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0"}  # leaks: Python's
    environment = {**os.environ, **options, **settings, **more}
    return run_patiently([*fixed, *command], CPU_SECONDS, env=environment)


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


def run_sample(mode: str, files: list[str]) -> subprocess.CompletedProcess[str]:
    """A sample of some operators' tests that runs every kernel; another one in each mode."""
    sanitizer = MODES[mode][0]
    # float64 has the barriers of float32; under ThreadSanitizer only the tests without a choice of dtypes have it
    dtypes = ("float32", "bfloat16") if sanitizer == "thread" else backend.DTYPES[sanitizer]
    seed = list(MODES).index(mode) + (cases.SEED or 0)
    options = ["--device=cuda_on_cpu", f"--sample={seed}", "--small", f"--dtypes={','.join(dtypes)}"]
    options += ["-k", "not opcheck and not gradcheck and not compile and not same_bits"]  # no other calls, only more
    return run(
        mode,
        [sys.executable, "-m", "pytest", "-sqx", *files, *options],
        CUDA_ON_CPU_SANITIZER=sanitizer,
        LD_PRELOAD=backend.preload(sanitizer),
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join([str(backend.ROOT), os.environ.get("PYTHONPATH", "")]),
    )


# mode -> processes that share the operators, ten seconds each to start; the longest first. Forward is how
# the operators' tests run themselves, the whole of them, and blocks finds what thread finds.
SAMPLED = {"blocks": 2, "address": 1, "random": 1, "reverse": 1}


# Of a sample, these take turns: one with a sanitizer and one without.
TURNS = [[("blocks", 0), ("address", 0), ("blocks", 1)], [("random", 0), ("reverse", 0)]]


def taken() -> list[tuple[str, int]]:
    if cases.SEED is None:
        return [(mode, part) for mode, parts in SAMPLED.items() for part in range(parts)]
    return [turn[cases.SEED % len(turn)] for turn in TURNS]


@pytest.mark.parametrize(("mode", "part"), taken())
def test_kernels(mode, part):
    """Every kernel is right and free of reports in each mode."""
    names = [f"test_{path.stem}*.py" for path in backend.sources()]
    files = sorted({str(path) for name in names for path in (backend.ROOT / "tests").glob(name)})
    if mode == "blocks":
        files = [path for path in files if "extremes" not in path]  # races do not depend on values
    backend.build_operators(MODES[mode][0])
    done = run_sample(mode, files[part :: SAMPLED[mode]])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    assert re.search(r"^[1-9]\d* passed", done.stdout, re.MULTILINE)
    assert "skipped" not in done.stdout
