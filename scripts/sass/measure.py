"""Times the cases of workloads.py on this machine's GPU, beside what predict.py says of them; reads counters by ncu.

usage: python scripts/sass/measure.py [WORD ...] [--json FILE] [--predicted FILE] [--counters CSV | --profiled]
A case is taken if its name holds all the words. Times are medians of 30 calls, each after the L2 cache was emptied.
--predicted reads predict.py's --json. --counters runs everything again under ncu, which needs its counters to be
readable, and writes a row for each launch of a kernel and each of METRICS; the clocks are left as they are.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import torch
from tables import kernels_report
from workloads import Case, build, cases

from pspnet_fast.bench.timing import gpu_seconds, host_seconds, synchronized

ROUNDS = 30
COPIED = 1 << 30  # bytes
STALLS = ("barrier", "long_scoreboard", "short_scoreboard", "lg_throttle", "mio_throttle", "math_pipe_throttle", "wait")
STALLS += ("no_instruction", "not_selected", "branch_resolving", "dispatch_stall", "membar", "imc_miss")
METRICS = [
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors_op_read.sum",
    "lts__t_sectors_op_write.sum",
    "lts__t_sector_hit_rate.pct",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__cycles_active.avg",
    "sm__cycles_elapsed.max",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__block_size",
    *(f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in STALLS),
]


def copy_rate() -> float:
    """Bytes a second, read and written together, of the best of ten copies."""
    source, target = (torch.ones(COPIED, dtype=torch.uint8) for _ in range(2))
    copy = synchronized(lambda: target.copy_(source), torch.device("cuda"))
    return 2 * COPIED / min(host_seconds(copy) for _ in range(10))


def timed(case: Case, rate: float, predicted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Seconds of the case, of its bytes at this GPU's rate, and the prediction if there is one."""
    work = build(case)
    for _ in range(3):
        work.call()
    seconds = gpu_seconds(work.call, lambda: None, torch.device("cuda"), ROUNDS)
    before = predicted.get(str(case), {})
    return {
        "case": str(case),
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "floor": work.floor_bytes / rate,
        "predicted": before.get("predicted"),
        "limit": before.get("limit"),
    }


def profiled(chosen: list[Case]) -> None:
    """Each case once, between the marks that ncu waits for."""
    for case in chosen:
        work = build(case)
        work.call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda.nvtx.range_push(str(case))
        work.call()
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_pop()
        torch.cuda.profiler.stop()


def count(words: list[str], path: Path) -> None:
    """Everything once more under ncu."""
    ncu = shutil.which("ncu") or sys.exit("measure: there is no ncu on PATH")
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--nvtx", "--csv", "--page", "raw"]
    command += ["--print-units", "base", "--metrics", ",".join(METRICS)]
    with path.open("w", encoding="utf-8") as out:
        subprocess.run([*command, sys.executable, __file__, *words, "--profiled"], stdout=out, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--json", type=Path, help="writes everything to this file")
    parser.add_argument("--predicted", type=Path, help="what predict.py wrote")
    parser.add_argument("--counters", type=Path, metavar="CSV")
    parser.add_argument("--profiled", action="store_true", help="what --counters runs under ncu")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("measure: there is no CUDA GPU here")
    if args.counters:
        count(args.words, args.counters)
        return
    torch.set_default_device("cuda")
    torch.set_grad_enabled(False)
    chosen = [case for case in cases() if all(word in str(case) for word in args.words)]
    if args.profiled:
        profiled(chosen)
        return
    predicted = json.loads(args.predicted.read_text())["profiles"] if args.predicted else []
    rate = copy_rate()
    rows = [timed(case, rate, {profile["case"]: profile for profile in predicted}) for case in chosen]
    name = torch.cuda.get_device_name()
    record = {"gpu": name, "copy": rate, "rows": rows}
    print(f"{name}, torch {torch.__version__}: copies move {rate / 1e12:.2f} TB/s, read and written\n")
    print(kernels_report(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
