"""Measures cases: all providers of a case take turns, so that what else the machine does slows all alike."""

import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pspnet_fast.bench import memory
from pspnet_fast.bench.cases import Case, Step, dtype_name
from pspnet_fast.bench.providers import Provider
from pspnet_fast.bench.record import machine, summary
from pspnet_fast.bench.timing import Machine, Stopwatch, host_seconds, synchronized

CHECKS = 7  # of the machine's own rates beside each case
LEAST = 4  # rounds


@dataclass(frozen=True)
class Options:
    """How long a run measures.

    Args:
        seconds: of each provider in each case, about.
        most: rounds.
        memory: also the peak of this package and of plain torch.
        compile_until: torch.compile is left out of cases that begin later, in seconds since the start.
    """

    seconds: float = 0.5
    most: int = 50
    memory: bool = True
    compile_until: float = float("inf")


class Run:
    """The cases of one run, on one device."""

    def __init__(
        self,
        device: torch.device,
        providers: Sequence[Provider],
        unavailable: Mapping[str, str],
        asked: bool,
        options: Options,
    ) -> None:
        """``asked``: the providers were named, so each is tried in every case."""
        self._device, self._providers, self._asked, self._options = device, providers, asked, options
        self._unavailable = dict(unavailable)
        self._machine, self._rows, self._start = Machine(device), [], time.monotonic()  # type: ignore[var-annotated]

    def measure(self, case: Case, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """The row of a case; ``tell`` is given what is being done. What fails is in the row, not raised."""
        torch.compiler.reset()  # or one function compiled for many cases is no longer compiled in the ninth
        row: dict[str, Any] = {
            "suite": case.suite, "group": case.group, "table": case.table, "case": case.name,
            "dtype": dtype_name(case.dtype), "target": case.target, "floor_bytes": 0, "operations": 0,
        }  # fmt: skip
        results: dict[str, dict[str, Any]] = {}
        watches: dict[str, tuple[Stopwatch, int]] = {}
        for provider in self._providers:
            if not self._is_meant(provider, case):
                continue
            tell(provider.name)
            try:
                torch.manual_seed(0)
                step = provider.prepare(case, self._device)
                if step is not None:
                    row |= {"floor_bytes": step.floor_bytes, "operations": step.operations}
                    watches[provider.name] = self._started(step)
            except Exception as error:  # of a compiler or a runtime: any
                results[provider.name] = {"error": said(error)}
        tell("rounds")
        times, row["machine"] = self._rounds(watches, case.dtype)
        results |= {name: seconds if isinstance(seconds, dict) else summary(seconds) for name, seconds in times.items()}
        watches.clear()
        gc.collect()
        if self._options.memory:
            for name in ("ours", "eager"):
                if "median" in results.get(name, {}):
                    tell(f"memory of {name}")
                    self._add_peak(results[name], case, name == "ours")
        row["providers"] = {p.name: results[p.name] for p in self._providers if p.name in results}
        self._rows.append(row)
        return row

    def record(self) -> dict[str, Any]:
        """All so far as numbers, strings, lists and dictionaries; times in seconds."""
        for row in self._rows:
            dtype = getattr(torch, row["dtype"])
            row["floor"] = self._machine.floor(row["floor_bytes"], row["operations"], dtype)
            for result in row["providers"].values():
                if "median" in result:
                    bytes_alone = self._machine.floor(row["floor_bytes"], 0, dtype)
                    result["of_copy"] = bytes_alone / result["median"]
                    if row["operations"]:
                        result["of_product"] = row["operations"] / result["median"] / self._machine.product_rate(dtype)
        return {
            "machine": machine(self._device),
            "copy_bytes_per_second": self._machine.copies,
            "operations_per_second": {dtype_name(d): rate for d, rate in self._machine.products.items()},
            "unavailable": self._unavailable,
            "cases": self._rows,
        }

    def _is_meant(self, provider: Provider, case: Case) -> bool:
        late = time.monotonic() - self._start > self._options.compile_until
        if late and provider.name in ("compile", "max-autotune", "ours-compile"):
            return False
        return self._asked or provider.unasked(case, self._device)

    def _started(self, step: Step) -> tuple[Stopwatch, int]:
        """Its stopwatch after calls that compile and load, and the rounds that it gets."""
        call = synchronized(step.call, self._device)
        host_seconds(call, step.setup)
        once = host_seconds(call, step.setup)
        watch = Stopwatch(step.call, step.setup, self._device)
        return watch, int(min(max(self._options.seconds / once, LEAST), self._options.most))

    def _rounds(
        self, watches: dict[str, tuple[Stopwatch, int]], dtype: torch.dtype
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The seconds of each provider, or its error, and summaries of a copy and a product beside them.

        Providers that need fewer rounds have theirs evenly among those of the others.
        """
        most = max((rounds for _, rounds in watches.values()), default=1)
        failed: dict[str, Any] = {}
        own: list[tuple[float, float]] = []
        for number in range(most):
            if _is_due(number, min(CHECKS, most), most):
                own.append(self._machine.measure(dtype))
            for name, (watch, rounds) in watches.items():
                if name not in failed and _is_due(number, rounds, most):
                    try:
                        watch.run()
                    except Exception as error:
                        failed[name] = {"error": said(error)}
        times = {name: failed.get(name) or watch.seconds() for name, (watch, _) in watches.items()}
        copies, products = zip(*own, strict=True)
        return times, {"copy": summary(copies), "product": summary(products)}

    def _add_peak(self, result: dict[str, Any], case: Case, ours: bool) -> None:
        try:
            result["peak_bytes"] = memory.peak(case, ours, self._device)
        except Exception as error:
            result["memory_error"] = said(error)


def _is_due(number: int, rounds: int, most: int) -> bool:
    """Whether one of so many rounds, spread evenly over the most, falls on this number."""
    return (number + 1) * rounds // most > number * rounds // most


def said(error: Exception) -> str:
    """The kind of an error and its first line, without the names of this machine's folders."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"(?:[A-Za-z]:)?[/\\][\w.+-]+(?:[/\\][\w.+-]+)+", "PATH", lines[0] if lines else "")
    return f"{type(error).__name__}: {text}"[:300]
