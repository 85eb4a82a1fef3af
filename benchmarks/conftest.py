"""How the benchmarks measure, and the summary after them."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparison import Comparison, Results, synchronized
from torch._inductor.exc import InductorError

SECONDS, ROUNDS = 1.0, (9, 100)  # of measuring one implementation; at least and at most

_RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--markdown", type=Path, metavar="FILE", help="also write the summary to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = Results()


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info.pop("node")  # the name of the host is nobody's concern


@pytest.hookimpl(trylast=True)  # below the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if not (results.seconds or results.memory):
        return
    report = results.report()
    terminalreporter.section("summary: medians, against eager PyTorch and against the memory's floor")
    terminalreporter.write_line(report)
    if path := config.getoption("--markdown"):
        path.write_text(report + "\n", encoding="utf-8")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[_RESULTS]


@pytest.fixture
def measure(benchmark, results: Results) -> Callable[..., None]:
    """measure(comparison, implementation, function, setup=None): the median time of function()."""

    def run(
        comparison: Comparison,
        implementation: str,
        function: Callable[[], object],
        setup: Callable[[], None] = lambda: None,
    ) -> None:
        function = synchronized(function, comparison.device)
        try:
            once = min(_seconds(function, setup) for _ in range(3))  # the first compiles
        except InductorError as error:
            results.seconds.setdefault(comparison, {})[implementation] = math.nan
            pytest.skip(f"torch.compile fails: {error!r}")
        rounds = int(min(max(SECONDS / once, ROUNDS[0]), ROUNDS[1]))
        results.bandwidth(comparison.device).measure()
        benchmark.group, benchmark.name = f"{comparison.table}: {comparison.case}", implementation
        benchmark.pedantic(function, setup=setup, rounds=rounds)
        if benchmark.stats:  # not with --benchmark-disable
            results.seconds.setdefault(comparison, {})[implementation] = benchmark.stats.stats.median
            benchmark.extra_info["floor_bytes"] = comparison.floor_bytes

    return run


def _seconds(function: Callable[[], object], setup: Callable[[], None]) -> float:
    setup()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
