"""Renders what is kept in benchmarks/results/ in Markdown: operators and modules (bench.json, by `pspnet-fast bench` or
`pytest benchmarks`), of GPUs also PSPNet-50 as a whole (network.json, by network.py) and every kernel against its
prediction (kernels.json, by scripts/sass/measure.py).

python benchmarks/tables.py FILE.json ...  prints all tables of these bench.json
python benchmarks/tables.py --keep PATH    copies a bench.json, or what a folder has of the three, to the results
                            --again FILE   with --keep: a later run of some of the cases, which takes their place
python benchmarks/tables.py --readme       writes what is kept of GPUs into docs/gpu.md and speed.md, of CPUs into
                                           docs/cpu.md
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pspnet_fast.bench.record import read
from pspnet_fast.bench.tables import machine_text, markdown, report, table

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, SUMMARY = ROOT / "benchmarks" / "results", ROOT / "docs" / "gpu.md", ROOT / "docs" / "speed.md"
CPU_PAGE = ROOT / "docs" / "cpu.md"
PART = re.compile(r"(?<=<!-- of benchmarks/results -->\n).*?(?=<!-- end -->)", re.DOTALL)
NO_GPU = "No GPU has run the CUDA kernels yet, so there are no GPU figures.\n"


WRITTEN = "`python benchmarks/tables.py --readme` writes this page from `benchmarks/results/`."


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
        parts.append(machine_text(records["bench"]))
        rows = [
            row
            for row in records["bench"]["cases"]
            if row["case"].startswith("16x") and "x60x60 bfloat16 channels_last" in row["case"]
        ]
        parts.append(table(rows, [row["table"].removesuffix(": forward") for row in rows]))
    return "\n\n".join([*parts, "All of it, every kernel too: [gpu.md](gpu.md)."]) + "\n" if kept else NO_GPU


def page(kept: Sequence[dict[str, Any]]) -> str:
    """docs/gpu.md."""
    parts = ["# Measured on GPUs", WRITTEN]
    for records in kept:
        parts += [f"## {records['bench']['machine']['gpu']}", report(records["bench"])]
        if "network" in records:
            parts += ["### PSPNet-50 as a whole", network_report(records["network"]["rows"])]
        if "kernels" in records:
            told = "Each operator alone, its L2 cache empty before; predictions are those of [kernels.md](kernels.md)."
            parts += ["### Kernels", told, kernels_report(records["kernels"])]
    return "\n\n".join(parts) + "\n"


def cpu_page(kept: Sequence[dict[str, Any]]) -> str:
    """docs/cpu.md."""
    what = "What the columns are: [benchmarks.md](benchmarks.md). What bounds them: [performance.md](performance.md)."
    parts = ["# Measured on CPUs", WRITTEN, what]
    for records in kept:
        machine = records["bench"]["machine"]
        parts += [f"## {machine['processor']}, {machine['instruction_set']}, {machine['threads']} threads"]
        parts += [report(records["bench"])]
    return "\n\n".join(parts) + "\n"


def kept_records(gpu: bool = True) -> list[dict[str, Any]]:
    """Of each GPU, or of each CPU, by the name of its files."""
    folders = sorted(path.parent for path in RESULTS.glob("*/bench.json"))
    records = [
        {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    ]
    return [files for files in records if (files["bench"]["machine"]["gpu"] is not None) == gpu]


def with_later(record: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """A run whose cases a later run of the same machine has measured again; each rate is the best of both.

    Raises:
        ValueError: another machine or other versions, or a case that the first run has not.
    """
    ours, others = (
        {k: v for k, v in r["machine"].items() if k not in ("date", "commit", "note")} for r in (record, later)
    )
    if ours != others:
        raise ValueError(f"not the same machine and versions: {ours}, {others}")
    again = {(row["table"], row["case"]): row for row in later["cases"]}
    if new := again.keys() - {(row["table"], row["case"]) for row in record["cases"]}:
        raise ValueError(f"the first run has no {sorted(new)}")
    rates = {
        key: {name: max(rate, later[key].get(name, 0.0)) for name, rate in record[key].items()}
        for key in ("copy_bytes_per_second", "operations_per_second")
    }
    names = sorted({row["table"].split(":")[0].split(" ")[0] for row in again.values()})
    note = f"Measured again in a later run, commit {later['machine']['commit']}: {', '.join(names)}."
    cases = [again.get((row["table"], row["case"]), row) for row in record["cases"]]
    return record | rates | {"machine": record["machine"] | {"note": note}, "cases": cases}


def keep(path: Path) -> Path:
    """Copies a run's file, or the files in its folder, to the results; returns where to."""
    files = (
        {"bench.json": path}
        if path.is_file()
        else {n: path / n for n in ("bench.json", "network.json", "kernels.json")}
    )
    m = read(files["bench.json"])["machine"]
    name = m["gpu"] or f"{m['processor']} {m['threads']} threads {m['instruction_set']}"
    target = RESULTS / re.sub(r"\W+", "_", name)
    target.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        if file.exists():
            shutil.copyfile(file, target / name)
    return target


def write_part(path: Path, text: str) -> None:
    """Puts a text between the two comments of a page.

    Raises:
        ValueError: the page has not the comments, or has them twice.
    """
    whole, count = PART.subn(lambda _: text, path.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{path} has not once the two comments that the tables go between")
    path.write_text(whole, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json")
    parser.add_argument("--keep", type=Path, metavar="PATH")
    parser.add_argument("--again", type=Path, metavar="FILE")
    parser.add_argument("--readme", action="store_true")
    args = parser.parse_args()
    if not (args.files or args.keep or args.readme):
        parser.error("needs files, --keep or --readme")
    if args.keep:
        target = keep(args.keep)
        if args.again:
            kept = target / "bench.json"
            kept.write_text(json.dumps(with_later(read(kept), read(args.again)), indent=1) + "\n", encoding="utf-8")
        print(f"kept in {target}")
    for path in args.files:
        print(report(read(path)))
    if args.readme:
        PAGE.write_text(page(kept_records()), encoding="utf-8")
        write_part(SUMMARY, summary_part(kept_records()))
        CPU_PAGE.write_text(cpu_page(kept_records(gpu=False)), encoding="utf-8")


if __name__ == "__main__":
    main()
