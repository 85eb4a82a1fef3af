"""The CPU kernels of lower instruction sets than this processor's best: PSPNET_FAST_ISA, one process each."""

import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

import pspnet_fast  # noqa: F401  (loads the kernels)

ROOT = Path(__file__).parents[1]
NAMES = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}  # as asked for, as reported
# every kernel, dtype and layout, at sizes with and without a remainder behind whole vectors
SELECTION = (
    "(values and bins0 and (size3 or size5 or channels1 or channels3)) or layout or copy or folded or counts "
    "or (values and shape1) or weights"
)


def is_of_an_operator(test: Path) -> bool:
    return any(test.stem.startswith(f"test_{source.stem}") for source in (ROOT / "csrc" / "cpu").glob("*.cpp"))


def run(name: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PSPNET_FAST_ISA": name, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_the_best_is_the_default() -> None:
    """Tests of the operators themselves run with it."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    expected = "AVX-512" if " avx512vl" in flags else "AVX2" if " avx2" in flags else "baseline"
    assert torch.ops.pspnet_fast.cpu_instruction_set() == expected


@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_operators(name: str) -> None:
    order = list(NAMES)
    best = next(key for key in NAMES if NAMES[key] == torch.ops.pspnet_fast.cpu_instruction_set())
    if order.index(name) >= order.index(best):
        pytest.skip(f"{best} is this processor's best")
    script = "import pspnet_fast, torch; print(torch.ops.pspnet_fast.cpu_instruction_set())"
    assert run(name, "-c", script).stdout.strip() == NAMES[name]
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if is_of_an_operator(path)]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--device=cpu", "-k", SELECTION, *files]
    result = run(name, *command, *([] if cases.SEED is None else [f"--sample={cases.SEED}"]))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("name", ["sse", "AVX2"])
def test_unknown_name(name: str) -> None:
    script = "import pspnet_fast, torch; pspnet_fast.ops.pyramid_pool(torch.zeros(4, 8, 9, 9), (1, 2))"
    result = run(name, "-c", script)
    assert result.returncode == 1
    assert "PSPNET_FAST_ISA must be one of baseline" in result.stderr
    assert f"on this processor, but is '{name}'" in result.stderr
