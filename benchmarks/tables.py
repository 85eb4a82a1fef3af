"""Renders what a GPU measured in Markdown: operators and modules (bench.json, by record.py), PSPNet-50 as a whole
(network.json, by network.py), every kernel against its prediction (kernels.json, by scripts/sass/measure.py).

python benchmarks/tables.py FILE.json ...   prints all tables of these bench.json
python benchmarks/tables.py --keep FOLDER   copies what is there of the three to benchmarks/results/GPU/
python benchmarks/tables.py --readme        writes those of benchmarks/results/ into docs/gpu.md, some into speed.md
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, SUMMARY = ROOT / "benchmarks" / "results", ROOT / "docs" / "gpu.md", ROOT / "docs" / "speed.md"
HEADER = ["case", "eager ms", "compile ms", "fused ms", "eager / fused", "floor ms", "fused / floor", "target"]
SUMMARY_PART = re.compile(r"(?<=<!-- of benchmarks/results -->\n).*(?=<!-- end -->)", re.DOTALL)
NO_GPU = "No GPU has run the CUDA kernels yet, so there are no GPU figures.\n"


def report(record: dict[str, Any]) -> str:
    """All of one run."""
    parts = [_machine(record)]
    for title, rows in record["tables"].items():
        parts.append(f"{title}\n\n{markdown(HEADER, [_row(row) for row in rows])}")
    if record["memory"]:
        rows = [
            [case, *(f"{by[name] / 1e6:.1f}" for name in ("eager", "fused"))] for case, by in record["memory"].items()
        ]
        title = "Peak memory of the forward pass beyond input and output (target: 5 MB)"
        parts.append(f"{title}\n\n{markdown(['case', 'eager MB', 'fused MB'], rows)}")
    return "\n\n".join(parts)


def network_report(rows: Sequence[dict[str, Any]]) -> str:
    """Of network.json; ratios are those to stock of the same case, eager."""
    cells, stock = [], rows[0]
    for row in rows:
        stock = row if row["implementation"] == "stock" else stock
        peak = (f"{row['bytes'] / 1e9:.2f}", f"{row['bytes'] / stock['bytes']:.2f}") if row["bytes"] else ("", "")
        speed = f"{row['batch'] / row['seconds']:.1f}", f"{stock['seconds'] / row['seconds']:.2f}"
        cells.append([row["case"], row["implementation"], *speed, *peak])
    return markdown(["case", "implementation", "images/s", "times stock", "peak GB", "of stock"], cells)


def kernels_report(record: dict[str, Any]) -> str:
    """Of kernels.json: what predict.py said is there where it was at hand."""
    cells = []
    for row in record["rows"]:
        seconds, guess = row["seconds"], row["predicted"]
        predicted = (f"{guess * 1e6:.1f}", f"{seconds / guess:.2f}") if guess else ("", "")
        times = f"{row['floor'] * 1e6:.1f}", f"{seconds * 1e6:.1f}", f"{seconds / row['floor']:.2f}"
        cells.append([row["case"], *times, *predicted])
    return markdown(["case", "bytes us", "measured us", "/ bytes", "predicted us", "/ predicted"], cells)


def summary_part(kept: Sequence[dict[str, Any]]) -> str:
    """The GPU section of docs/speed.md: of modules, bfloat16 in channels_last at batch 16."""
    parts = []
    for records in kept:
        if "network" in records:
            network, machine = records["network"], records["network"]["machine"]
            told = f"{machine['gpu']}, CUDA {machine['cuda']}, torch {machine['torch']}, {machine['date']}"
            parts += [f"PSPNet-50 as a whole, 473x473, 150 classes; {told}", network_report(network["rows"])]
        parts.append(_machine(records["bench"]))
        rows = [
            [title.removesuffix(": forward"), *_row(row)]
            for title, rows in records["bench"]["tables"].items()
            for row in rows
            if row["case"].startswith("16x") and "x60x60 bfloat16 channels_last" in row["case"]
        ]
        parts.append(markdown(["", *HEADER], rows))
    return "\n\n".join([*parts, "All of it, every kernel too: [gpu.md](gpu.md)."]) + "\n" if kept else NO_GPU


def page(kept: Sequence[dict[str, Any]]) -> str:
    """docs/gpu.md."""
    parts = [
        "# Measured on GPUs",
        "`python benchmarks/tables.py --readme` writes this page from `benchmarks/results/`.",
    ]
    for records in kept:
        parts += [f"## {records['bench']['machine']['gpu']}", report(records["bench"])]
        if "network" in records:
            parts += ["### PSPNet-50 as a whole", network_report(records["network"]["rows"])]
        if "kernels" in records:
            told = "Each operator alone, its L2 cache empty before; predictions are those of [kernels.md](kernels.md)."
            parts += ["### Kernels", told, kernels_report(records["kernels"])]
    return "\n\n".join(parts) + "\n"


def kept_records() -> list[dict[str, Any]]:
    """Of each GPU, by the name of its files."""
    folders = sorted(path.parent for path in RESULTS.glob("*/bench.json"))
    return [
        {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    ]


def keep(folder: Path) -> Path:
    """Copies a run's files to the results; returns where to."""
    gpu = json.loads((folder / "bench.json").read_text(encoding="utf-8"))["machine"]["gpu"]
    target = RESULTS / gpu.replace(" ", "_")
    target.mkdir(parents=True, exist_ok=True)
    for name in ("bench.json", "network.json", "kernels.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
    return target


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows]
    cells = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _machine(record: dict[str, Any]) -> str:
    m = record["machine"]
    if m["gpu"]:
        first = (
            f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}, torch {m['torch']}, {m['date']}, "
            f"commit {m['commit'] or 'unknown'}."
        )
    else:
        first = (
            f"{m['processor']}, {m['threads']} threads, kernels for {m['instruction_set']}, torch {m['torch']}; "
            f"glibc's memory settings: {m['glibc']}."
        )
    copies = ", ".join(f"{best / 1e9:.1f} GB/s in {kind}" for kind, best in record["copy_bytes_per_second"].items())
    if m.get("note"):
        first += f" {m['note']}"
    text = f"{first}\ncopy_, read + written, best of this run: {copies}; floors use the greatest."
    if rates := record["operations_per_second"]:
        products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in rates.items())
        text += f"\nMatrix products of torch, best of this run: {products}; floors of convolutions use them."
    return text


def _row(row: dict[str, Any]) -> list[str]:
    medians = {name: summary and summary["median"] for name, summary in row["seconds"].items()}
    eager, fused = medians.get("eager"), medians.get("fused")
    ratio = eager / fused if eager and fused else None
    verdict = ""
    if ratio and row["target"]:
        verdict = f"{row['target']:.3g}x {'met' if ratio >= row['target'] else 'missed'}"
    return [
        row["case"],
        *(_milliseconds(medians, name) for name in ("eager", "compile", "fused")),
        f"{ratio:.1f}" if ratio else "",
        f"{row['floor'] * 1e3:.2f}",
        f"{fused / row['floor']:.1f}" if fused else "",
        verdict,
    ]


def _milliseconds(medians: dict[str, float | None], name: str) -> str:
    if name not in medians:
        return ""
    seconds = medians[name]
    return "fails" if seconds is None else f"{seconds * 1e3:.2f}" if seconds >= 1e-4 else f"{seconds * 1e3:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--readme", action="store_true")
    args = parser.parse_args()
    if not (args.files or args.keep or args.readme):
        parser.error("needs files, --keep or --readme")
    if args.keep:
        print(f"kept in {keep(args.keep)}")
    for path in args.files:
        print(report(json.loads(path.read_text(encoding="utf-8"))))
    if args.readme:
        PAGE.write_text(page(kept_records()), encoding="utf-8")
        text, count = SUMMARY_PART.subn(lambda _: summary_part(kept_records()), SUMMARY.read_text(encoding="utf-8"))
        if count != 1:
            parser.error(f"{SUMMARY} has not the two comments that the tables go between")
        SUMMARY.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
