"""The cases of `pspnet-fast bench` as tests: one for each, measured by every provider in turns."""

from collections.abc import Callable

import pytest
import torch

from pspnet_fast.bench.cases import Case, all_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # CUDA_VISIBLE_DEVICES= for the CPU beside a GPU


def benchmark(group: str) -> Callable[..., None]:
    """A test of all cases of an operator or module; those of the suite "network" are network.py's on a GPU."""
    chosen = [case for case in all_cases(DEVICE) if case.group == group]

    @pytest.mark.parametrize("case", chosen, ids=str)
    def test_case(measure: Callable[[Case], None], case: Case) -> None:
        measure(case)

    return test_case
