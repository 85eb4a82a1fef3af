"""How `pytest benchmarks` measures, and the summary after it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cases_of import DEVICE

from pspnet_fast.bench.cases import Case
from pspnet_fast.bench.providers import chosen_providers
from pspnet_fast.bench.record import write
from pspnet_fast.bench.runner import Options, Run
from pspnet_fast.bench.tables import report

_RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of pspnet_fast")
    group.addoption("--markdown", type=Path, metavar="FILE", help="also write the summary to FILE")
    group.addoption("--json", type=Path, metavar="FILE", help="also write medians and quantiles to FILE, for tables.py")
    group.addoption("--compile-until", type=float, metavar="SECONDS", help="skip torch.compile after that time")
    group.addoption("--providers", metavar="NAME,...", help="of pspnet-fast bench; by default eager, compile, ours")
    group.addoption("--memory", action="store_true", help="also measure the peak of eager and ours")


def pytest_configure(config: pytest.Config) -> None:
    names = config.getoption("--providers")
    providers, missing = chosen_providers(names or "eager,compile,ours", DEVICE)
    gpu = DEVICE.type == "cuda"
    options = Options(
        seconds=0.15 if gpu else 1.0,
        most=100 if gpu else 50,
        memory=config.getoption("--memory"),
        compile_until=config.getoption("--compile-until") or float("inf"),
    )
    config.stash[_RUN] = Run(DEVICE, providers, missing, names is not None, options)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    record = config.stash[_RUN].record()
    if not record["cases"]:
        return
    terminalreporter.section("summary: medians, against eager PyTorch and against the machine's floor")
    terminalreporter.write_line(report(record))
    if path := config.getoption("--markdown"):
        path.write_text(report(record) + "\n", encoding="utf-8")
    if path := config.getoption("--json"):
        write(record, path)


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Measures a case; fails if this package or plain torch does, where others may fail and be told of."""

    def run(case: Case) -> None:
        results = request.config.stash[_RUN].measure(case)["providers"]
        failed = {name: results[name] for name in ("ours", "eager") if "error" in results.get(name, {})}
        assert not failed

    return run
