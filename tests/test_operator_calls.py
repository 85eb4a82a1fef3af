"""FusedPPM and FusedPSPHead take as few operator calls as promised, counted by benchmarks/operator_calls.py."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")

PATH = Path(__file__).parents[1] / "benchmarks" / "operator_calls.py"
MOST = {
    ("FusedPPM", False): [3],
    ("FusedPPM", True): [8, 6],
    ("FusedPSPHead", False): [6],
    ("FusedPSPHead", True): [12, 12],
}


@pytest.mark.parametrize("training", [False, True])
def test_calls(training):
    spec = importlib.util.spec_from_file_location("operator_calls", PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    x = torch.randn(2, script.CHANNELS, script.SIZE, script.SIZE)
    for name, stock, fused in script.modules(torch.device("cpu")):
        counts = [[part.total() for part in script.calls_of(m, x, training, False)] for m in (fused, stock)]
        assert all(ours <= most for ours, most in zip(counts[0], MOST[name, training], strict=True)), counts
        assert all(ours < theirs for ours, theirs in zip(*counts, strict=True)), counts
