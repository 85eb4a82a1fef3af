"""What got slower between two records, beyond the noise of both.

The times of two runs differ by the code and by the machine's state. Each is divided by the copy or the matrix product,
whichever limits the case, that was timed in turns with it; a change counts where it exceeds what the spread of all four
medians explains, and a threshold for what differs between processes (the place of memory and code), which no spread
within a run shows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pspnet_fast.bench.tables import markdown

THRESHOLD = 1.1  # times: smaller changes are never told
DEVIATIONS = 3.0  # standard deviations of the logarithm of the ratio


@dataclass(frozen=True)
class Change:
    """A case of both records: ``ratio`` > 1 is slower by so much, of which the factor ``noise`` may be chance."""

    case: str
    provider: str
    before: float
    after: float
    ratio: float
    noise: float

    def verdict(self, threshold: float = THRESHOLD) -> str:
        """ "slower", "faster" or ""."""
        limit = max(threshold, self.noise)
        return "slower" if self.ratio > limit else "faster" if self.ratio < 1 / limit else ""


def changes(old: dict[str, Any], new: dict[str, Any], providers: Sequence[str] = ("ours",)) -> list[Change]:
    """Of the cases that both have, in the new record's order.

    Raises:
        ValueError: they have no case in common, or are of machines whose times say nothing about each other's.
    """
    for key in ("processor", "gpu", "threads", "instruction_set"):
        a, b = (record["machine"].get(key) for record in (old, new))
        if a != b:
            raise ValueError(f"the records are of different machines: {key} {a!r} and {b!r}")
    before = {(row["table"], row["case"]): row for row in old["cases"] if "machine" in row}
    found = []
    for row in new["cases"]:
        other = before.get((row["table"], row["case"])) if "machine" in row else None
        for name in providers if other else ():
            assert other is not None
            results = [r["providers"].get(name, {}) for r in (other, row)]
            if all("median" in result for result in results):
                found.append(_change(f"{row['table']}: {row['case']}", name, other, row))
    if not found:
        raise ValueError("the records have no case in common that has the machine's rates beside it")
    return found


def report(found: Sequence[Change], threshold: float = THRESHOLD) -> str:
    """A table of what changed, the slower first, and how many did not."""
    told = sorted((c for c in found if c.verdict(threshold)), key=lambda c: -c.ratio)
    same = f"{len(found) - len(told)} of {len(found)} cases are as fast as before, within noise or {threshold - 1:.0%}."
    if not told:
        return same
    header = ["case", "provider", "before ms", "after ms", "normalised", "noise", ""]
    rows = [
        [
            c.case, c.provider, f"{c.before * 1e3:.3f}", f"{c.after * 1e3:.3f}", f"{c.ratio:.2f}", f"{c.noise:.2f}",
            c.verdict(threshold),
        ]
        for c in told
    ]  # fmt: skip
    return f"{markdown(header, rows)}\n\n{same}"


def _change(case: str, provider: str, old: dict[str, Any], new: dict[str, Any]) -> Change:
    limit = "copy" if new["floor_bytes"] and _bound_by_copy(new) else "product"
    parts = [(row["providers"][provider], row["machine"][limit]) for row in (old, new)]
    (time_before, own_before), (time_after, own_after) = parts
    ratio = (time_after["median"] / own_after["median"]) / (time_before["median"] / own_before["median"])
    deviation = math.sqrt(sum(_deviation(s) ** 2 for s in (time_before, own_before, time_after, own_after)))
    return Change(case, provider, time_before["median"], time_after["median"], ratio, math.exp(DEVIATIONS * deviation))


def _bound_by_copy(row: dict[str, Any]) -> bool:
    """Whether the bytes take longer than the operations at the rates of the row's run."""
    result = row["providers"]["ours" if "ours" in row["providers"] else next(iter(row["providers"]))]
    return result.get("of_product", 0.0) <= result.get("of_copy", 1.0)


def _deviation(times: dict[str, float]) -> float:
    """The standard deviation of a median, relative to it: of normal times, 1.2533 sigma / sqrt(n), by the quartiles."""
    sigma = (times["q75"] - times["q25"]) / 1.349
    return 1.2533 * sigma / math.sqrt(times["runs"]) / times["median"]
