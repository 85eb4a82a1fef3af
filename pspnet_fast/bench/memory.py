"""Peak memory of a call, beyond what was there before it.

On a CPU it is the growth of the resident set (Linux), which sees the kernels' own scratch as well as tensors, in a
process of its own: a copy of one that has loaded torch and done nothing else. On a GPU it is the allocator's count.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from pspnet_fast import FusedPPM
from pspnet_fast.bench.cases import Case
from pspnet_fast.bench.providers import as_it_is
from pspnet_fast.bench.stock import StockPPM
from pspnet_fast.inference.memory import _reset_peak, _status

T = TypeVar("T")
# With a fixed threshold glibc hands every large block back at once: none is left to be used a second time unseen.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def growth(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at most beyond those before the call, those of its result included. What it loads and starts counts too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return torch.cuda.max_memory_allocated(device) - before
    _reset_peak()
    before = _status("VmRSS")
    result = call()  # noqa: F841
    return _status("VmHWM") - before


def peak(case: Case, ours: bool, device: torch.device) -> int | None:
    """Bytes of one call of the package or of plain torch; None where the system does not tell."""
    if device.type == "cuda":
        return _of_case(case, ours, device, torch.get_num_threads())
    if not sys.platform.startswith("linux"):
        return None
    return in_child(_of_case, case, ours, device, torch.get_num_threads())


def in_child(measure: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in a process of its own.

    Raises:
        RuntimeError: the function failed, or its process ended without a result.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    pickle.dump((measure, arguments), server.stdin)
    server.stdin.flush()
    result, error = pickle.load(server.stdout)
    if error:
        raise RuntimeError(error)
    return result


@cache
def _server() -> subprocess.Popen[bytes]:
    """Serves processes that begin with torch loaded; it ends when this process does, which closes the pipe."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from pspnet_fast.bench.memory import serve; serve()"
    pipe, environment = subprocess.PIPE, os.environ | ENVIRONMENT
    return subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, env=environment)


def serve() -> None:
    """Answers what `in_child` asks, each by a fork: torch has no threads yet that a fork would lose."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a case prints is no result
    while True:
        try:
            measure, arguments = pickle.load(sys.stdin.buffer)
        except (EOFError, KeyboardInterrupt):
            return
        child = os.fork()
        if child == 0:
            try:
                answer = measure(*arguments), ""
            except Exception as error:
                answer = None, f"{type(error).__name__}: {error}"
            pickle.dump(answer, results)
            results.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            pickle.dump((None, f"the process that measures memory ended with {status}"), results)
            results.flush()


def _of_case(case: Case, ours: bool, device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _warm_up(case.dtype, device)
    step = case.make(device, ours, as_it_is)
    step.setup()
    return growth(step.call, device)


def _warm_up(dtype: torch.dtype, device: torch.device) -> None:
    """Loads the code of kernels and libraries, and starts the threads."""
    fused = FusedPPM(32).to(device, dtype)
    x = torch.randn(2, 32, 12, 12, device=device, dtype=dtype)
    for module in (fused, StockPPM(fused)):
        module(x).sum().backward()
