"""Renders what benchmarks measured (record.py) in Markdown.

python benchmarks/tables.py FILE.json ...   prints all tables of these files
python benchmarks/tables.py --readme        writes those of benchmarks/results/ into README.md
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEADER = ["case", "eager ms", "compile ms", "fused ms", "eager / fused", "floor ms", "fused / floor", "target"]
README_PART = re.compile(r"(?<=<!-- of benchmarks/results -->\n).*(?=<!-- end -->)", re.DOTALL)
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


def readme_part(records: Sequence[dict[str, Any]]) -> str:
    """The GPU section of the README: every table of every GPU that results are kept of."""
    if not records:
        return NO_GPU
    return "\n\n".join(map(report, records)) + "\n"


def kept_records() -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))
    ]


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
    parser.add_argument("--readme", action="store_true", help="write the tables of benchmarks/results/ into README.md")
    args = parser.parse_args()
    if bool(args.files) == args.readme:
        parser.error("needs either files or --readme")
    for path in args.files:
        print(report(json.loads(path.read_text(encoding="utf-8"))))
    if args.readme:
        readme = ROOT / "README.md"
        text, count = README_PART.subn(lambda _: readme_part(kept_records()), readme.read_text(encoding="utf-8"))
        if count != 1:
            parser.error(f"{readme} has not the two comments that the tables go between")
        readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
