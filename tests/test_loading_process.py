"""The CPU kernels in a DataLoader's process: of any number of threads, and forked from a process that has several."""

from collections.abc import Iterator

import pytest
import torch
from kernel_calls import calls
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SECONDS = 120  # until a process that hangs is given up


def results() -> dict[str, list[Tensor]]:
    """By operator, as bytes."""
    torch.manual_seed(0)
    made = calls(torch.float32, "contiguous", 5)
    return {
        name: [t.contiguous().reshape(-1).view(torch.uint8) for t in call.run(call.given)]
        for name, call in made.items()
    }


class Results(Dataset):
    """Item i: those of threads[i] threads; None leaves the number as it is."""

    def __init__(self, threads: list[int | None]) -> None:
        self.threads = threads

    def __len__(self) -> int:
        return len(self.threads)

    def __getitem__(self, index: int) -> tuple[int, dict[str, list[Tensor]]]:
        if (threads := self.threads[index]) is not None:
            torch.set_num_threads(threads)
        return torch.get_num_threads(), results()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("start", "threads", "found"), [("fork", [None], [1]), ("spawn", [1, 2, 4, 8], [1, 2, 4, 8])], ids=["fork", "spawn"]
)
def test_the_same_bits_as_here(start, threads, found):
    expected = results()
    loader = DataLoader(
        Results(threads), batch_size=None, num_workers=1, multiprocessing_context=start, timeout=SECONDS
    )
    items = list(loader)
    assert [count for count, _ in items] == found
    for count, got in items:
        for name, tensors in expected.items():
            assert all(map(torch.equal, tensors, got[name])), f"{name} with {count} threads"
