"""pytest --sample: what it leaves of a test's cases (conftest.py)."""

import itertools
from types import SimpleNamespace

import pytest
from conftest import sample

DTYPES, LAYOUTS, SIZES = ["float32", "bfloat16"], ["planar", "last", "slice"], [(1, 2), (3, 4), (3, 5), (6, 7)]


class Item:
    """As pytest's: of a fixture device, parametrised by dtype, layout and, in one list, height and width."""

    def __init__(self, test: str, **parameters: object) -> None:
        self.nodeid = f"test_it.py::{test}[{'-'.join(map(str, parameters.values()))}]"
        self.callspec = SimpleNamespace(params=parameters)

    def iter_markers(self, _: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(args=[names]) for names in ("dtype", ["layout"], "height, width")]


ITEMS = [
    Item(test, device=device, dtype=dtype, layout=layout, height=size[0], width=size[1])
    for test, device in itertools.product(["test_a", "test_b"], ["cpu", "cuda"])
    for dtype, layout, size in itertools.product(DTYPES, LAYOUTS, SIZES)
]


@pytest.mark.parametrize("seed", range(3))
def test_each_value_line_and_dtype_in_each_layout_of_each_test_on_each_device(seed: int) -> None:
    kept = sample(ITEMS, seed)
    assert kept == [item for item in ITEMS if item in kept]
    for group in itertools.product(["test_a", "test_b"], ["cpu", "cuda"]):
        found = [i.callspec.params for i in kept if (i.nodeid[12:18], i.callspec.params["device"]) == group]
        assert {(p["dtype"], p["layout"]) for p in found} == set(itertools.product(DTYPES, LAYOUTS))
        assert {(p["height"], p["width"]) for p in found} == set(SIZES)
        assert len(found) == 6  # no more than it takes


def test_a_seed_has_the_same_cases_always_and_seeds_have_all_of_them() -> None:
    assert sample(ITEMS, 1) == sample(ITEMS, 1) != sample(ITEMS, 2)
    assert set().union(*(sample(ITEMS, seed) for seed in range(40))) == set(ITEMS)
