"""The examples in README.md and docs/ that need other people's packages; nothing is fetched."""

import importlib.util

import pytest
from documents import PEERS, python_blocks

if any(importlib.util.find_spec(name) is None for name in PEERS):
    pytest.skip("no peers installed: make test-peers", allow_module_level=True)

import packages  # noqa: F401  (torchvision's operators where it cannot load its own)

BLOCKS = python_blocks(of_peers=True)


@pytest.mark.parametrize("place", BLOCKS)
def test_python_block(place: str) -> None:
    exec(compile(BLOCKS[place], place, "exec"), {"__name__": "__main__"})
