"""`pspnet-fast bench` end to end on tiny cases; what it compares, refuses and records. No time is asserted."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from pspnet_fast.bench import cases, head, loss, memory, ops, providers, runner
from pspnet_fast.bench.cases import Case, Map, Step, all_cases, select
from pspnet_fast.bench.compare import changes
from pspnet_fast.bench.timing import Machine
from pspnet_fast.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, MAP, LOGITS = torch.device("cpu"), Map((1, 16, 12, 12)), Map((1, 5, 8, 8))


def tiny(_: torch.device) -> list[Case]:
    """One case of an operator in each direction, one of a module and one of the loss."""
    float32 = torch.float32
    return [
        Case("ops", "pool", "pool", f"{MAP} forward", float32, partial(ops._pool, MAP, "forward"), standard=True),
        Case("ops", "pool", "pool", f"{MAP} backward", float32, partial(ops._pool, MAP, "backward"), standard=True),
        Case("head", "ppm", "PPM", str(MAP), float32, partial(head._ppm, MAP, True), 2.0, standard=True, quick=True),
        Case("loss", "loss", "loss", "both", float32, partial(loss._cross_entropy, LOGITS, (31, 33), True), quick=True),
    ]


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny cases and small copies and products take the place of all."""
    monkeypatch.setattr(cases, "all_cases", tiny)
    monkeypatch.setattr("pspnet_fast.bench.timing.COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("pspnet_fast.bench.timing.PRODUCT_SIZE", {"cpu": 64})


def bench(*arguments: object):
    return CliRunner().invoke(main, ["bench", "--device", "cpu", "--seconds", "0.01", *map(str, arguments)])


def test_a_run_leaves_tables_a_record_and_pictures(tiny_suite, tmp_path):
    path, folder = tmp_path / "run" / "a.json", tmp_path / "pictures"
    done = bench("--providers", "ours,eager", "--json", path, "--plot", folder)
    assert done.exit_code == 0, done.output
    record = json.loads(path.read_text())
    assert [(row["table"], row["case"]) for row in record["cases"]] == [(c.table, c.name) for c in tiny(CPU)[:3]]
    for row in record["cases"]:
        assert row["floor"] > 0
        for result in row["providers"].values():
            assert result["q10"] <= result["median"] <= result["q90"]
            assert result["of_copy"] == pytest.approx(
                row["floor_bytes"] / result["median"] / max(record["copy_bytes_per_second"].values())
            )
            assert "memory_error" not in result
        assert row["providers"].keys() == {"ours", "eager"}
        assert f"| {row['case']} " in done.output
    names = {f"{name}.{kind}" for name in ("speedup", "roofline", "memory") for kind in ("png", "svg")}
    assert {file.name for file in folder.iterdir()} == names
    assert all(file.stat().st_size > 5000 for file in folder.iterdir())
    machine = json.dumps(record["machine"])
    assert record["machine"]["threads"] == 1
    assert str(tmp_path) not in path.read_text()
    assert "node" not in machine


def compared(tmp_path, change, *arguments):
    """The comparison of a made record with itself, changed."""
    times = {"runs": 20, "median": 1.0, "q10": 0.97, "q25": 0.98, "q75": 1.02, "q90": 1.03}
    row = {"suite": "ops", "table": "pool", "dtype": "float32", "target": None, "floor_bytes": 100, "operations": 0}
    row |= {"floor": 0.1, "machine": {"copy": dict(times), "product": dict(times)}}
    row["providers"] = {name: times | {"of_copy": 0.1} for name in ("ours", "eager")}
    machine = {"gpu": None, "processor": "P", "threads": 2, "instruction_set": "AVX2", "torch": "2", "date": "d"}
    record = {"machine": machine | {"commit": None, "glibc": "the defaults"}, "unavailable": {}}
    record |= {"copy_bytes_per_second": {"ordinary pages": 1e9}, "operations_per_second": {"float32": 1e9}}
    record["cases"] = [copy.deepcopy(row) | {"case": name} for name in ("a", "b")]
    changed = copy.deepcopy(record)
    change(changed)
    for name, content in (("old", record), ("new", changed)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return bench("--from", tmp_path / "new.json", "--compare", tmp_path / "old.json", *arguments)


def slower(times: dict[str, float], factor: float) -> None:
    times.update({key: value * factor for key, value in times.items() if key not in ("runs", "of_copy")})


def test_a_planted_slowdown_is_found_and_no_other(tmp_path):
    done = compared(tmp_path, lambda record: slower(record["cases"][1]["providers"]["ours"], 1.3))
    assert done.exit_code == 1, done.output
    told = done.output.split("Against")[1]
    assert "pool: b" in told
    assert "pool: a" not in told
    assert "| 1.30 |" in " ".join(told.split())
    assert "slower" in told


def test_a_slow_machine_is_no_slowdown(tmp_path):
    def half_as_fast(record):
        for row in record["cases"]:
            for times in (*row["providers"].values(), row["machine"]["copy"]):
                slower(times, 2)

    done = compared(tmp_path, half_as_fast)
    assert done.exit_code == 0, done.output
    assert "2 of 2 cases are as fast" in done.output


def test_noise_and_small_changes_are_no_slowdown(tmp_path):
    def noisy(record):
        slower(record["cases"][0]["providers"]["ours"], 1.08)
        ours = record["cases"][1]["providers"]["ours"]
        slower(ours, 1.3)
        ours.update(q25=0.9, q75=1.7)

    assert compared(tmp_path, noisy).exit_code == 0
    done = compared(tmp_path, lambda record: slower(record["cases"][0]["providers"]["ours"], 1.08), "--threshold", "5")
    assert done.exit_code == 1, done.output


def test_another_machine_is_refused(tmp_path):
    done = compared(tmp_path, lambda record: record["machine"].update(threads=4))
    assert done.exit_code == 1
    assert "different machines: threads 2 and 4" in done.output
    with pytest.raises(ValueError, match="no case in common"):
        changes({"machine": {}, "cases": []}, {"machine": {}, "cases": []})


def test_a_failing_provider_and_case_are_recorded(tiny_suite):
    def breaks(device, ours, compiler):
        if ours:
            raise RuntimeError("no luck in /some/folder/file.py")
        return Step(lambda: None, 8)

    case = Case("ops", "g", "t", "breaks", torch.float32, breaks)
    chosen = [providers.PROVIDERS[name] for name in ("ours", "eager")]
    run = runner.Run(CPU, chosen, {}, True, runner.Options(seconds=0, memory=False))
    assert run.measure(case)["providers"]["ours"] == {"error": "RuntimeError: no luck in PATH"}
    record = run.record()
    assert record["cases"][0]["providers"]["eager"]["runs"] == runner.LEAST
    assert not math.isnan(record["cases"][0]["floor"])


def test_an_interrupted_run_keeps_what_it_has(tiny_suite, tmp_path, monkeypatch):
    own, calls = runner.Run.measure, []

    def measure(self, case, tell):
        if calls:
            raise KeyboardInterrupt
        calls.append(case)
        return own(self, case, tell)

    monkeypatch.setattr(runner.Run, "measure", measure)
    result = bench("--suite", "all", "--no-memory", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert "interrupted: 1 of" in result.output
    assert len(json.loads((tmp_path / "a.json").read_text())["cases"]) == 1


@pytest.mark.parametrize("supported", [True, False])
def test_convolutions_in_bfloat16_are_standard_where_a_processor_has_it(supported, monkeypatch):
    """Elsewhere one of their training steps takes minutes."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    found = [case for case in head.cases(torch.device("cpu")) if case.standard and case.dtype == torch.bfloat16]
    assert any("FusedPPM" in case.table for case in found)
    assert any("FusedPSPHead" in case.table for case in found) == supported


def test_a_runtime_that_computes_something_else_is_refused():
    pytest.importorskip("onnxscript")
    case = Case(
        "head", "ppm", "t", "c", torch.float32, partial(head._ppm, MAP, False), stock=partial(head._stock, MAP, False)
    )
    zeros = providers._exported(lambda path, x: lambda: torch.zeros(1, 32, 12, 12))
    with pytest.raises(ValueError, match="differs from plain torch's by 1"):
        zeros(case, CPU)
    pytest.importorskip("onnxruntime")
    step = providers.PROVIDERS["onnxruntime"].prepare(case, CPU)
    assert step.call().shape == (1, 32, 12, 12)


def test_memory_sees_what_a_call_allocates():
    assert 64e6 < memory.in_child(_grow, 64_000_000) < 72e6
    with pytest.raises(RuntimeError, match="ValueError: refused"):
        memory.in_child(_refuse)
    assert memory.in_child(_grow, 0) < 1e6  # the server goes on


def _grow(size: int) -> int:
    torch.ones(8, dtype=torch.uint8)  # loads code
    return memory.growth(lambda: torch.ones(size, dtype=torch.uint8), CPU)


def _refuse() -> None:
    raise ValueError("refused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--providers", "ours,tvm"], "--providers must be some of ours, eager"),
        (["--case", "("], "--case '(' is no regular expression"),
        (["--case", "nothing like this"], "no case is left"),
    ],
)
def test_bad_arguments(tiny_suite, arguments, message):
    done = bench(*arguments)
    assert done.exit_code == 1
    assert message in done.output


def test_no_record(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert "is no record of pspnet-fast bench" in bench("--compare", path).output


def test_every_case_has_its_own_title_and_every_suite_some():
    every = all_cases(CPU)
    assert len({str(case) for case in every}) == len(every)
    assert {case.suite for case in select(every)} == set(cases.SUITES)
    assert {str(case) for case in select(every, quick=True)} < {str(case) for case in select(every)}
    assert {case.dtype for case in select(every, "head", "bfloat16", ".")} == {torch.bfloat16}


def test_rounds_are_spread_evenly():
    due = [number for number in range(50) if runner._is_due(number, 5, 50)]
    assert due == [9, 19, 29, 39, 49]
    assert sum(runner._is_due(number, 7, 50) for number in range(50)) == 7


def test_the_floor_is_the_slower_of_bytes_and_operations():
    machine = Machine(CPU)
    machine.copies, machine.products = {"pages": 100.0}, {torch.float32: 10.0}
    assert machine.floor(200, 0, torch.float32) == 2.0
    assert machine.floor(200, 40, torch.float32) == 4.0
