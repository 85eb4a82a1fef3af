"""How the benchmarks measure, and the summary after them."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparison import DEVICE, Comparison, Results
from record import record
from tables import report
from timing import gpu_seconds, host_seconds, synchronized
from torch._inductor.exc import InductorError

SECONDS = {"cpu": 1.0, "cuda": 0.15}[DEVICE.type]  # of measuring one implementation
ROUNDS = (9, 100)  # at least and at most

_RESULTS = pytest.StashKey[Results]()
_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of pspnet_fast")
    group.addoption("--markdown", type=Path, metavar="FILE", help="also write the summary to FILE")
    group.addoption("--json", type=Path, metavar="FILE", help="also write medians and quantiles to FILE, for tables.py")
    group.addoption("--compile-until", type=float, metavar="SECONDS", help="skip torch.compile after that time")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = Results()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest, and may be left out, comes last."""
    items.sort(key=lambda item: item.callspec.params.get("implementation") == "compile")


@pytest.hookimpl(optionalhook=True)  # on a GPU, times are taken without that plugin
def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info.pop("node")  # the name of the host is nobody's concern


@pytest.hookimpl(trylast=True)  # below the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if not (results.times or results.memory):
        return
    run = record(results)
    terminalreporter.section("summary: medians, against eager PyTorch and against the memory's floor")
    terminalreporter.write_line(report(run))
    if path := config.getoption("--markdown"):
        path.write_text(report(run) + "\n", encoding="utf-8")
    if path := config.getoption("--json"):
        path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[_RESULTS]


@pytest.fixture
def measure(request: pytest.FixtureRequest, results: Results) -> Callable[..., None]:
    """measure(comparison, implementation, function, setup=None): the times of function()."""

    def run(
        comparison: Comparison,
        implementation: str,
        function: Callable[[], object],
        setup: Callable[[], None] = lambda: None,
    ) -> None:
        until = request.config.getoption("--compile-until")
        if implementation == "compile" and until is not None and time.monotonic() - _START > until:
            pytest.skip(f"{until:g} s are over")
        torch.compiler.reset()  # or one function compiled for many cases is no longer compiled in the ninth
        returning_when_done = synchronized(function, DEVICE)
        try:
            once = min(host_seconds(returning_when_done, setup) for _ in range(3))  # the first compiles
        except InductorError as error:
            results.add(comparison, implementation, [math.nan])
            pytest.skip(f"torch.compile fails: {error!r}")
        rounds = int(min(max(SECONDS / once, ROUNDS[0]), ROUNDS[1]))
        results.bandwidth.measure()
        if DEVICE.type == "cuda":
            results.add(comparison, implementation, gpu_seconds(function, setup, DEVICE, rounds))
            return
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group, benchmark.name = f"{comparison.table}: {comparison.case}", implementation
        benchmark.pedantic(function, setup=setup, rounds=rounds)
        if benchmark.stats:  # not with --benchmark-disable
            results.add(comparison, implementation, benchmark.stats.stats.data)
            benchmark.extra_info["floor_bytes"] = comparison.floor_bytes

    return run
