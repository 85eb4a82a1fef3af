"""Pictures of a run: speed-ups, the roofline, memory. Readable on a screen and, by marks and hatches, in grey print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pspnet_fast.bench.tables import median, speedup

# Okabe and Ito's colours, told apart with any eyes; (colour, hatch, mark)
LOOKS = {
    "ours": ("#0072B2", "", "o"),
    "eager": ("#999999", "....", "s"),
    "compile": ("#E69F00", "////", "^"),
    "max-autotune": ("#D55E00", "\\\\\\\\", "v"),
    "ours-compile": ("#56B4E9", "xx", "D"),
    "onnxruntime": ("#009E73", "--", "P"),
    "openvino": ("#CC79A7", "++", "X"),
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
    """Times faster than eager, on a logarithmic scale; a case a group of bars."""
    rows = [row for row in record["cases"] if speedup(row)]
    names = [name for name in LOOKS if name != "eager" and any(speedup(row, name) for row in rows)]
    if not rows:
        return None
    figure, axes = _bars(rows, names, lambda row, name: speedup(row, name))
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times faster than plain torch (eager); median")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_title(_title(record), loc="left", fontsize=8)
    return figure


def _memory(record: dict[str, Any]) -> Figure | None:
    """Peak beyond what was there before, of both."""

    def peak(row: dict[str, Any], name: str) -> float | None:
        bytes = row["providers"].get(name, {}).get("peak_bytes")
        return None if bytes is None else bytes / 1e6

    rows = [row for row in record["cases"] if peak(row, "ours") is not None and peak(row, "eager") is not None]
    if not rows:
        return None
    figure, axes = _bars(rows, ["ours", "eager"], peak)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("peak memory of one call beyond what was there before, MB")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_title(_title(record), loc="left", fontsize=8)
    return figure


def _bars(rows: Sequence[dict[str, Any]], names: Sequence[str], value: Any) -> tuple[Figure, Axes]:
    """Horizontal bars, the first case on top, each with its number."""
    figure = Figure(figsize=(8, 0.6 + len(rows) * (0.12 + 0.13 * len(names))), layout="constrained")
    axes, height = figure.subplots(), 0.85 / len(names)
    for number, name in enumerate(names):
        color, hatch, _ = LOOKS[name]
        places = [index + (number - (len(names) - 1) / 2) * height for index in range(len(rows))]
        values = [value(row, name) for row in rows]
        kept = [(place, v) for place, v in zip(places, values, strict=True) if v is not None]
        at, widths = [place for place, _ in kept], [v for _, v in kept]
        bars = axes.barh(at, widths, height=height * 0.92, color=color, hatch=hatch, edgecolor="white", label=name)
        axes.bar_label(bars, [f"{v:.3g}" for _, v in kept], padding=2, fontsize=6.5)
    axes.set_yticks(range(len(rows)), [f"{row['table']}: {row['case']}" for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.margins(x=0.12)
    return figure, axes


def _roofline(record: dict[str, Any]) -> Figure | None:
    """Operations a second over operations a byte: the roof is the machine's copy and its matrix products.

    A filled mark is this package, a hollow one plain torch, joined by a line; numbers are explained below.
    """
    rows = [row for row in record["cases"] if row["operations"] and row["floor_bytes"] and median(row, "ours")]
    if not rows:
        return None
    figure = Figure(figsize=(8, 5 + 0.085 * len(rows)), layout="constrained")
    axes, legend = figure.subplots(2, 1, height_ratios=(5, 0.085 * len(rows) + 0.3))
    copy = max(record["copy_bytes_per_second"].values())
    intensities = [row["operations"] / row["floor_bytes"] for row in rows]
    low, high = (
        min(intensities) / 3,
        max(*intensities, *(r / copy for r in record["operations_per_second"].values())) * 3,
    )
    for dtype, rate in record["operations_per_second"].items():
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
    half = (len(rows) + 1) // 2
    for column, part in enumerate((rows[:half], rows[half:])):
        text = "\n".join(f"{i + 1 + column * half}  {row['table']}: {row['case']}" for i, row in enumerate(part))
        legend.text(column * 0.52, 1, text, va="top", fontsize=5.5, transform=legend.transAxes)
    return figure


def _title(record: dict[str, Any]) -> str:
    m = record["machine"]
    where = m["gpu"] or f"{m['processor']}, {m['threads']} threads, {m['instruction_set']}"
    return f"{where}; torch {m['torch']}, {m['date']}"
