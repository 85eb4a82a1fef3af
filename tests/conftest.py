"""Where the operators' tests run, and what they share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda_on_cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device that has kernels, and the CPU with the CUDA kernels' sources in place of its own.

    What a machine lacks for a part is skipped, saying so.
    """
    if request.param == "cuda_on_cpu":
        from cuda_on_cpu import backend

        try:
            backend.build_operators()
        except backend.NotAvailable as error:
            pytest.skip(f"the CUDA sources cannot be built for the CPU: {error}")
        with backend.instead_of_cpu_kernels():
            yield torch.device("cpu")
        return
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    yield torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Training of tiny models: more threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random values in every run."""
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills every fresh tensor with NaN, those that the kernels write included: an element left unwritten shows.

    torch does so in its deterministic mode, which the operators must work in anyway.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
