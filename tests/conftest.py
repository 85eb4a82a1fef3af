"""Where the operators' tests run, and what they share."""

import contextlib
import functools
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import cases
import pytest
import torch
from twice import Twice

DEVICES = ["cpu", "cuda_on_cpu", "cuda"]
# What --fast leaves out: processes started and killed, compilers, sanitizers, machine code, trainings to the end.
SLOW = [
    "aliasing",
    "bench",
    "build",
    "cache",
    "camvid",
    "cli_process",
    "cuda_on_cpu",
    "demo",
    "distributed",
    "documents",
    "export",
    "hostile_arguments",
    "instruction_sets",
    "kept_memory",
    "loading_process",
    "memory",
    "out_of_memory",
    "properties_fuse",
    "report_browser",
    "resume",
    "sass",
    "verify_gpu",
]
LONG = ["cuda_on_cpu", "sass"]
COUNTS = pytest.StashKey[tuple[int, int]]()  # of --sample: the cases that run, and those that there are
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic mode refuses cuBLAS
os.environ.setdefault("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # what inductor writes runs once: -O0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operators")
    group.addoption("--device", choices=DEVICES, help="only the tests that run on this one")
    help = "few cases of each test: each value of each parameter, and each dtype with each layout; other ones a SEED"
    group.addoption("--sample", type=int, metavar="SEED", help=help)
    group.addoption("--small", action="store_true", help="smaller maps of the same variety, for sanitizers")
    help = "for daily work: the CPU's kernels on such a sample, without compilers, processes and long trainings"
    group.addoption("--fast", action="store_true", help=help)
    group.addoption("--dtypes", type=lambda names: names.split(","), help="only the tests of these, as float32,float64")
    group.addoption("--twice", action="store_true", help="call each operator twice and compare the bits")
    group.addoption("--no-poison", action="store_true", help="leave fresh memory as it is, for tools that watch it")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cases.SEED = config.getoption("--sample")
    if config.getoption("--small"):
        cases.make_smaller()
    on_cpu = config.getoption("--device") in (None, "cuda_on_cpu") and not config.getoption("--fast")
    if on_cpu and config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        from cuda_on_cpu import backend

        with contextlib.suppress(backend.NotAvailable):  # the tests say why
            backend.build_operators()  # once, for all processes


@pytest.hookimpl(trylast=True)  # of what -k has left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--fast, --device, --dtypes and --sample, which leaves enough to run every kernel in every dtype and layout.

    What takes minutes begins first, so that no process is left alone with it at the end.
    """
    chosen = sorted(items, key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    if config.getoption("--fast"):
        chosen = sample([item for item in chosen if is_fast(item)], 0)
    if device := config.getoption("--device"):
        chosen = [item for item in chosen if parameters(item).get("device") == device]
    if dtypes := config.getoption("--dtypes"):
        chosen = [item for item in chosen if of_dtypes(item, dtypes)]
    if (seed := config.getoption("--sample")) is not None:
        every, chosen = chosen, sample(chosen, seed)
        config.stash[COUNTS] = getattr(config, "workeroutput", {})["cases"] = len(chosen), len(every)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def is_fast(item: pytest.Item) -> bool:
    slow = item.path.stem.removeprefix("test_") in SLOW or "peers" in item.path.parts or "compile" in item.name
    return not slow and parameters(item).get("device") in (None, "cpu")


def of_dtypes(item: pytest.Item, dtypes: Sequence[str]) -> bool:
    dtype = parameters(item).get("dtype", torch.float32)
    return str(dtype).removeprefix("torch.") in dtypes or not isinstance(dtype, torch.dtype)


def sample(items: list[pytest.Item], seed: int) -> list[pytest.Item]:
    """Of each test on each device the fewest cases, or nearly, that show what all of its cases show."""
    tests: dict[tuple[str, object], list[pytest.Item]] = {}
    for item in items:
        tests.setdefault((item.nodeid.split("[")[0], parameters(item).get("device")), []).append(item)
    kept: set[pytest.Item] = set()
    for (name, _), group in tests.items():
        left = {item: shown_by(item) for item in random.Random(f"{seed} {name}").sample(group, len(group))}
        while left:
            best = max(left, key=lambda item: len(left[item]))
            kept.add(best)
            left = {item: rest for item, shown in left.items() if (rest := shown - left[best])}
    return [item for item in items if item in kept]


def shown_by(item: pytest.Item) -> set[tuple[object, ...]]:
    """The value of each parameter, and together those that the test lists together."""
    values = {name: id(value) for name, value in parameters(item).items()}  # the same object for all cases of a test
    marks = [mark.args[0] for mark in item.iter_markers("parametrize")]
    lists = [names.replace(" ", "").split(",") if isinstance(names, str) else names for names in marks]
    lists += [["dtype", "layout"], *([name] for name in values)]
    shown = {tuple((name, values[name]) for name in names) for names in lists if values.keys() >= {*names}}
    return shown | {("itself",)}


def pytest_report_header(config: pytest.Config) -> list[str]:
    if (seed := config.getoption("--sample")) is None:
        return []
    return [f"a sample of the cases of each test: the same again by --sample {seed}, all of them without it"]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose processes choose
def pytest_testnodedown(node: Any) -> None:
    if cases := getattr(node, "workeroutput", {}).get("cases"):
        node.config.stash[COUNTS] = cases


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What a sample leaves out, and one line for each reason to skip, not for each place that gives it."""
    if COUNTS in config.stash:
        chosen, every = config.stash[COUNTS]
        seed = config.getoption("--sample")
        terminalreporter.write_line(f"left out by --sample {seed}: {every - chosen} of {every} cases")
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ())
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device that has kernels, and the CPU with the CUDA kernels' sources in place of its own.

    What a machine lacks for a part is skipped, saying so.
    """
    with contextlib.ExitStack() as stack:
        if request.param == "cuda_on_cpu":
            from cuda_on_cpu import backend

            try:
                stack.enter_context(backend.instead_of_cpu_kernels())
            except backend.NotAvailable as error:
                pytest.skip(f"the CUDA sources cannot be built for the CPU: {error}")
            stack.enter_context(what_is_torchs_is_shown_on_cpu())
        elif request.param == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA GPU on this machine")
        if request.config.getoption("--twice"):
            stack.enter_context(Twice())
        yield torch.device("cuda" if request.param == "cuda" else "cpu")


@contextlib.contextmanager
def what_is_torchs_is_shown_on_cpu() -> Iterator[None]:
    """opcheck of what an operator returns and writes to; gradcheck along a random direction.

    The rest of opcheck, registrations and graphs, is the same for all kernels and shown with the CPU's. Every gradient
    is held against the reference's in float64 besides.
    """
    with pytest.MonkeyPatch.context() as patch:
        utils = ("test_schema", "test_faketensor")
        patch.setattr(torch.library, "opcheck", functools.partial(torch.library.opcheck, test_utils=utils))
        patch.setattr(torch.autograd, "gradcheck", functools.partial(torch.autograd.gradcheck, fast_mode=True))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Training of tiny models: more threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training runs draw no curves: half the time of a toy run."""
    from pspnet_fast.training.report import Report

    monkeypatch.setattr(Report, "draw_curves", lambda _: None)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random values in every run."""
    torch.manual_seed(0)


@pytest.fixture
def poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills every fresh tensor with NaN, those that the kernels write included: an element left unwritten shows.

    torch does so in its deterministic mode, which the operators must work in anyway. What they are compared with may
    not be able to on a GPU (adaptive_avg_pool2d, nll_loss2d): a warning there.
    """
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = not request.config.getoption("--no-poison")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_maps_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads run without the concatenation at the sizes of small tests too."""
    from pspnet_fast import head
    from pspnet_fast.fusion import convolution

    monkeypatch.setattr(head, "concatenation_is_cheaper", lambda *_: False)
    monkeypatch.setattr(convolution, "LEAST_ELEMENTS", 0)
