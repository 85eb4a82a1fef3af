"""Where the operators' tests run, and what they share."""

import random
from collections.abc import Iterator

import cases
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "few cases of each test: each value of each parameter with each dtype"
    parser.addoption("--sample", type=int, metavar="SEED", help=help)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sample") is not None:
        cases.make_smaller()


@pytest.hookimpl(trylast=True)  # of what -k has left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--sample: enough to run every instance of every kernel in every mode of tests/cuda_on_cpu, in little time."""
    if (seed := config.getoption("--sample")) is None:
        return
    seen: set[tuple[str, ...]] = set()
    kept: set[pytest.Item] = set()
    for item in random.Random(seed).sample(items, len(items)):
        test = item.nodeid.split("[")[0]
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        dtype = str(parameters.get("dtype"))
        values = {(test, dtype), *((test, dtype, name, repr(value)) for name, value in parameters.items())}
        if not values <= seen:
            seen |= values
            kept.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


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
