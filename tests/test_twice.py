"""The second call that --twice makes of every operator."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from twice import Twice


@pytest.fixture
def operators() -> Iterator[object]:
    library = torch.library.Library("twice_test", "DEF")
    library.define("noise(Tensor x) -> Tensor")
    library.define("count_(Tensor(a!) x, bool steady) -> ()")

    def count_(x: Tensor, steady: bool) -> None:
        x += 1 if steady else torch.rand(())

    library.impl("noise", torch.rand_like, "CPU")
    library.impl("count_", count_, "CPU")
    yield torch.ops.twice_test
    library._destroy()


def test_other_bits_are_found(operators):
    with Twice("twice_test"):
        with pytest.raises(AssertionError, match=r"twice_test.noise.default gave other bits"):
            operators.noise(torch.zeros(3))
        with pytest.raises(AssertionError, match=r"twice_test.count_.default gave other bits"):
            operators.count_(torch.zeros(3), False)


def test_what_an_operator_writes_is_written_once(operators):
    counts = torch.tensor([1.0, torch.nan])
    with Twice("twice_test"):
        operators.count_(counts, True)
    assert counts.tolist()[0] == 2
    assert counts.isnan().tolist() == [False, True]
