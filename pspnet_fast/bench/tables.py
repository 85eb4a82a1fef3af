"""A run's figures as text: tables in Markdown, readable as they stand."""

from collections.abc import Sequence
from typing import Any

# columns of the other providers stand between those of eager and fused, which is "ours"
OTHERS = ("compile", "max-autotune", "ours-compile", "onnxruntime", "openvino")
ALWAYS = ("eager", "compile")


def report(record: dict[str, Any]) -> str:
    """All of one run: the machine, then a table for each title."""
    parts = [machine_text(record)]
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in record["cases"]:
        tables.setdefault(row["table"], []).append(row)
    for title, rows in tables.items():
        parts.append(f"{title}\n\n{table(rows)}")
    if failures := failures_text(record):
        parts.append(failures)
    return "\n\n".join(parts)


def table(rows: Sequence[dict[str, Any]], titles: Sequence[str] | None = None) -> str:
    """The cases as rows; with ``titles``, these in a column before.

    Memory and the shares of the machine's rates have columns where they were measured.
    """
    used = [name for name in OTHERS if name in ALWAYS or any(name in row["providers"] for row in rows)]
    shares = any("of_copy" in row["providers"].get("ours", {}) for row in rows)
    memory = any(row["providers"].get("ours", {}).get("peak_bytes") for row in rows)
    header = ["case", "eager ms", *(f"{name} ms" for name in used), "fused ms", "eager / fused", "floor ms"]
    header += ["fused / floor", *(["of copy", "of product"] if shares else []), "target"]
    header += ["eager MB", "fused MB"] if memory else []
    cells = [_row(row, used, shares, memory) for row in rows]
    if titles is not None:
        header, cells = ["", *header], [[title, *line] for title, line in zip(titles, cells, strict=True)]
    return markdown(header, cells)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows]
    cells = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def machine_text(record: dict[str, Any]) -> str:
    """The machine, its rates, and which providers it lacked."""
    m = record["machine"]
    if m["gpu"]:
        first = (
            f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}, torch {m['torch']}, {m['date']}, "
            f"commit {m['commit'] or 'unknown'}."
        )
    else:
        first = (
            f"{m['processor']}, {m['threads']} threads, kernels for {m['instruction_set']}, torch {m['torch']}, "
            f"{m['date']}, commit {m['commit'] or 'unknown'}; glibc's memory settings: {m['glibc']}."
        )
    copies = ", ".join(f"{best / 1e9:.1f} GB/s in {kind}" for kind, best in record["copy_bytes_per_second"].items())
    if m.get("note"):
        first += f" {m['note']}"
    text = f"{first}\ncopy_, read + written, best of this run: {copies}; floors use the greatest."
    if rates := record["operations_per_second"]:
        products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates.items())
        text += f"\nMatrix products of torch, best of this run: {products}; floors of convolutions use them."
    for name, reason in record.get("unavailable", {}).items():
        text += f"\nWithout {name}: {reason}."
    return text


def failures_text(record: dict[str, Any]) -> str:
    """What failed, a line each; empty if nothing did."""
    lines = []
    for row in record["cases"]:
        for name, result in row["providers"].items():
            for key in ("error", "memory_error"):
                if key in result:
                    lines.append(f"- {row['table']}: {row['case']}, {name}: {result[key]}")
    return "\n".join(["Failed:", "", *lines]) if lines else ""


def median(row: dict[str, Any], provider: str) -> float | None:
    """Its seconds; None where it did not run or failed."""
    return row["providers"].get(provider, {}).get("median")


def speedup(row: dict[str, Any], provider: str = "ours") -> float | None:
    """How many times faster than eager it is."""
    eager, other = median(row, "eager"), median(row, provider)
    return eager / other if eager and other else None


def _row(row: dict[str, Any], used: Sequence[str], shares: bool, memory: bool) -> list[str]:
    ours, fused, ratio = row["providers"].get("ours", {}), median(row, "ours"), speedup(row)
    verdict = ""
    if ratio and row["target"]:
        verdict = f"{row['target']:.3g}x {'met' if ratio >= row['target'] else 'missed'}"
    cells = [
        row["case"],
        *(_milliseconds(row, name) for name in ("eager", *used, "ours")),
        f"{ratio:.1f}" if ratio else "",
        f"{row['floor'] * 1e3:.2f}",
        f"{fused / row['floor']:.1f}" if fused and row["floor"] else "",
    ]
    if shares:
        cells += [f"{ours[key]:.0%}" if key in ours else "" for key in ("of_copy", "of_product")]
    cells.append(verdict)
    if memory:
        peaks = [row["providers"].get(name, {}).get("peak_bytes") for name in ("eager", "ours")]
        cells += ["" if peak is None else f"{peak / 1e6:.1f}" for peak in peaks]
    return cells


def _milliseconds(row: dict[str, Any], name: str) -> str:
    if name not in row["providers"]:
        return ""
    seconds = median(row, name)
    return "fails" if seconds is None else f"{seconds * 1e3:.2f}" if seconds >= 1e-4 else f"{seconds * 1e3:.4f}"
