"""scripts/verify_gpu.sh where there is no GPU, how it reads its tests' results, and the tables of what it measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
RECORD = {
    "machine": {"gpu": "GPU X", "driver": "1", "cuda": "13.0", "torch": "2.11.0", "date": "2026-01-02", "commit": None},
    "copy_bytes_per_second": {"ordinary pages": 4e12},
    "operations_per_second": {"bfloat16": 7.5e14},
    "cases": [
        {
            "table": "an operator",
            "case": "1x2x3x4 bfloat16",
            "target": 3.0,
            "floor": 1e-4,
            "providers": {"eager": {"median": 1e-3}, "compile": {"error": "why"}, "ours": {"median": 2e-4}},
        },
        {
            "table": "an operator",
            "case": "large",
            "target": 9.0,
            "floor": 1e-4,
            "providers": {"eager": {"median": 1e-3}, "ours": {"median": 4e-5}},
        },
    ],
}


def load(path: str) -> ModuleType:
    """A file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "verify_gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_it_skips(tmp_path):
    done = verify(str(tmp_path / "out"), "sanitize", "bench")
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout
    parts = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert {name: part["result"] for name, part in parts.items()} == {"sanitize": "skipped", "bench": "skipped"}
    assert all("no GPU" in part["why"] for part in parts.values())


def test_an_unknown_part_is_named(tmp_path):
    done = verify(str(tmp_path / "out"), "benchmark")
    assert done.returncode == 2
    assert "no such part: benchmark (of build, test, twice, sanitize, kernels, network, bench)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_it_finds_the_tests_of_every_operator():
    tests_of_kernels = load("scripts/verify_gpu.py").tests_of_kernels
    operators = {f"tests/test_{path.stem}.py" for path in (ROOT / "csrc").glob("*.cpp")}
    operators -= {"tests/test_ops.py", "tests/test_kept_memory.py"}  # the schemas, and memory of the CPU
    assert set(tests_of_kernels(operators=True)) == operators
    assert operators | {"tests/test_head.py", "tests/test_modules.py"} <= set(tests_of_kernels(operators=False))
    assert all((ROOT / name).exists() for name in operators)


def test_failures_are_read_from_junit(tmp_path):
    path = tmp_path / "test.xml"
    path.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="wrong&#10;more"/></testcase>'
        '<testcase name="c"><skipped/></testcase><testcase name="d"><error message="gone"/></testcase>'
        "</testsuite></testsuites>"
    )
    counts, failures = load("scripts/verify_gpu.py").read_junit(path)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures == ["b: wrong", "d: gone"]


def test_tables_of_a_record():
    text = load("benchmarks/tables.py").report(RECORD)
    assert "GPU X, driver 1, CUDA 13.0, torch 2.11.0, 2026-01-02, commit unknown." in text
    assert "4000.0 GB/s" in text
    assert "750 TFLOP/s in bfloat16" in text
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert cells[2] == ["1x2x3x4 bfloat16", "1.00", "fails", "0.20", "5.0", "0.10", "2.0", "3x met"]
    assert cells[3] == ["large", "1.00", "", "0.0400", "25.0", "0.10", "0.4", "9x met"]


def test_what_is_kept_becomes_a_page_and_a_summary(tmp_path, monkeypatch):
    tables = load("benchmarks/tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    rows = [{"case": "prediction, batch 2", "batch": 2, "implementation": "stock", "seconds": 0.5, "bytes": 4e9}]
    rows.append(rows[0] | {"implementation": "fused", "seconds": 0.25, "bytes": 1e9})
    timed = {"case": "an operator", "seconds": 3e-5, "floor": 1e-5, "predicted": 2e-5}
    files = {
        "bench": RECORD,
        "network": {"machine": RECORD["machine"], "rows": rows},
        "kernels": {"rows": [timed, timed | {"predicted": None}]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert tables.keep(tmp_path) == tmp_path / "results" / "GPU_X"
    kept = tables.kept_records()
    page = " ".join(tables.page(kept).replace("|", " ").split())
    assert "prediction, batch 2 fused 8.0 2.00 1.00 0.25" in page
    assert "an operator 10.0 30.0 3.00 20.0 1.50 an operator 10.0 30.0 3.00" in page
    assert "1x2x3x4 bfloat16 1.00 fails 0.20" in page
    assert "fused 8.0 2.00" in " ".join(tables.summary_part(kept).replace("|", " ").split())


def test_a_later_run_takes_the_place_of_its_cases():
    tables = load("benchmarks/tables.py")
    slow, other = RECORD["cases"][0], RECORD["cases"][1]
    quick = slow | {"providers": {"ours": slow["providers"]["eager"]}}
    later = RECORD | {"cases": [quick], "machine": RECORD["machine"] | {"commit": "later"}}
    later["copy_bytes_per_second"] = {name: 2 * rate for name, rate in RECORD["copy_bytes_per_second"].items()}
    joined = tables.with_later(RECORD, later)
    assert joined["cases"] == [quick, other, *RECORD["cases"][2:]]
    assert joined["copy_bytes_per_second"] == later["copy_bytes_per_second"]
    assert joined["operations_per_second"] == RECORD["operations_per_second"]
    assert "commit later" in tables.machine_text(joined)
    with pytest.raises(ValueError, match="not the same machine"):
        tables.with_later(RECORD, later | {"machine": RECORD["machine"] | {"torch": "3"}})
    with pytest.raises(ValueError, match="the first run has no"):
        tables.with_later(RECORD, later | {"cases": [slow | {"case": "unknown"}]})


def test_the_pages_show_the_results_that_are_kept():
    """`python benchmarks/tables.py --readme` writes it."""
    tables = load("benchmarks/tables.py")
    part = tables.PART.search(tables.SUMMARY.read_text(encoding="utf-8"))
    assert part is not None
    assert part.group() == tables.summary_part(tables.kept_records())
    assert not tables.kept_records() or tables.PAGE.read_text(encoding="utf-8") == tables.page(tables.kept_records())
