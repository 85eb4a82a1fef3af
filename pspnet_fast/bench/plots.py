"""Pictures of a run: speed-ups, the roofline, memory. Readable on a screen and, by marks and hatches, in grey print."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from pspnet_fast.bench.tables import median, speedup

# Okabe and Ito's colours, told apart with any eyes, and hatches
LOOKS = {
    "ours": ("#0072B2", ""),
    "eager": ("#999999", "...."),
    "compile": ("#E69F00", "////"),
    "max-autotune": ("#D55E00", "\\\\\\\\"),
    "ours-compile": ("#56B4E9", "xx"),
    "onnxruntime": ("#009E73", "----"),
    "openvino": ("#CC79A7", "++"),
}
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.5}
SUITE_MARKS = {"ops": "o", "head": "s", "upsampled": "^", "loss": "D", "model": "P", "train": "X"}


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Writes speedup, roofline and memory, what the record has figures for, as PNG and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in (("speedup", _speedup), ("roofline", _roofline), ("memory", _memory)):
            if (picture := figure(record)) is None:
                continue
            for kind in ("png", "svg"):
                path = folder / f"{name}.{kind}"
                picture.savefig(path, dpi=150, bbox_inches="tight")
                written.append(path)
    return written


def _speedup(record: dict[str, Any]) -> Figure | None:
    """Times faster than eager, on a logarithmic scale, to the right of 1; slower to the left."""
    rows = [row for row in record["cases"] if speedup(row)]
    if not rows:
        return None
    names = [name for name in LOOKS if name != "eager"]
    figure, axes = _bars(record, rows, names, speedup, base=1)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times faster than plain torch (eager), by medians")
    _plain_numbers(axes, (1, 2, 5))
    return figure


def _memory(record: dict[str, Any]) -> Figure | None:
    """Peak beyond what was there before, of both."""

    def peak(row: dict[str, Any], name: str) -> float | None:
        bytes = row["providers"].get(name, {}).get("peak_bytes")
        return None if bytes is None else bytes / 1e6

    rows = [row for row in record["cases"] if peak(row, "ours") is not None and peak(row, "eager") is not None]
    if not rows:
        return None
    figure, axes = _bars(record, rows, ["ours", "eager"], peak, base=0)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("peak memory of one call beyond what was there before, MB")
    _plain_numbers(axes, (1,))
    return figure


def _bars(
    record: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    names: Sequence[str],
    value: Callable[[dict[str, Any], str], float | None],
    base: float,
) -> tuple[Figure, Axes]:
    """Horizontal bars from ``base`` on, a case a group, the first on top; each bar with its number."""
    found = [[(name, v) for name in names if (v := value(row, name)) is not None] for row in rows]
    height = 0.6 + sum(0.11 * len(group) + 0.08 for group in found)
    figure = Figure(figsize=(8, height + 0.5), layout="constrained")
    axes, middles, place = figure.subplots(), [], 0.0
    bars: dict[str, list[tuple[float, float]]] = {}
    for group in found:
        middles.append(place + (len(group) - 1) / 2)
        for name, v in group:
            bars.setdefault(name, []).append((place, v))
            place += 1
        place += 0.7
    for name in (name for name in LOOKS if name in bars):
        color, hatch = LOOKS[name]
        places, values = [p for p, _ in bars[name]], [v for _, v in bars[name]]
        drawn = axes.barh(
            places, [v - base for v in values], left=base, height=0.9, color=color, hatch=hatch, edgecolor="white",
            linewidth=0.5, label=name,
        )  # fmt: skip
        axes.bar_label(drawn, [f"{v:.3g}" for v in values], padding=2, fontsize=6)
    axes.set_yticks(middles, [f"{row['table']}: {row['case']}" for row in rows], fontsize=6.5)
    axes.set_ylim(place - 0.9, -0.8)
    axes.margins(x=0.12)
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, ncols=4)
    axes.set_title(_title(record), loc="right", fontsize=8)
    return figure, axes


def _plain_numbers(axes: Axes, steps: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=30))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=7)


def _roofline(record: dict[str, Any]) -> Figure | None:
    """Operations a second over operations a byte: the roof is the machine's copy and its matrix products.

    A filled mark is this package, a hollow one plain torch, joined by a line; numbers are explained below.
    """
    rows = [row for row in record["cases"] if row.get("operations") and row.get("floor_bytes") and median(row, "ours")]
    if not rows:
        return None
    half = (len(rows) + 1) // 2
    below = 0.085 * half + 0.2
    figure = Figure(figsize=(8, 5 + below), layout="constrained")
    axes, legend = figure.subplots(2, 1, height_ratios=(5, below))
    copy = max(record["copy_bytes_per_second"].values())
    intensities = [row["operations"] / row["floor_bytes"] for row in rows]
    rates = record["operations_per_second"]
    low, high = min(intensities) / 3, max(*intensities, *(rate / copy for rate in rates.values())) * 3
    for dtype, rate in rates.items():
        if rate < rates.get("float32", 0.0):  # of a dtype without instructions, no roof for kernels that widen it
            continue
        dashes = "-" if dtype == "float32" else "--"
        ends = [low, min(max(rate / copy, low), high), high]
        axes.plot(ends, [min(x * copy, rate) for x in ends], "k", linestyle=dashes, linewidth=1.2)
        axes.annotate(f"products in {dtype}", (high, rate), ha="right", va="bottom", fontsize=7)
    for number, (row, x) in enumerate(zip(rows, intensities, strict=True), 1):
        mark, reached = SUITE_MARKS[row["suite"]], row["operations"] / median(row, "ours")
        color = LOOKS["ours"][0] if row["dtype"] == "float32" else LOOKS["max-autotune"][0]
        if eager := median(row, "eager"):
            axes.plot([x, x], [row["operations"] / eager, reached], color=color, linewidth=0.5, alpha=0.6)
            axes.plot(x, row["operations"] / eager, mark, color=color, markerfacecolor="white", markersize=4)
        axes.plot(x, reached, mark, color=color, markersize=5)
        axes.annotate(str(number), (x, reached), xytext=(4, 3), textcoords="offset points", fontsize=6.5)
    axes.loglog()
    axes.set_xlabel("operations a byte that must be moved")
    axes.set_ylabel("operations a second")
    axes.set_title(
        f"{_title(record)}\nfilled: this package, hollow: plain torch; blue: float32, red: bfloat16; roof: copy "
        f"{copy / 1e9:.3g} GB/s and matrix products",
        loc="left",
        fontsize=8,
    )
    legend.axis("off")
    for column, part in enumerate((rows[:half], rows[half:])):
        text = "\n".join(f"{i + 1 + column * half}  {row['table']}: {row['case']}" for i, row in enumerate(part))
        legend.text(column * 0.54 - 0.04, 1, text, va="top", fontsize=5, transform=legend.transAxes)
    return figure


def _title(record: dict[str, Any]) -> str:
    m = record["machine"]
    where = m["gpu"] or f"{m['processor']}, {m['threads']} threads, {m['instruction_set']}"
    return f"{where}; torch {m['torch']}, {m['date']}"
