"""Predicts the time of every kernel from its machine code, executed on a CPU: docs/kernels.md says how and how far.

usage: python scripts/sass/predict.py [WORD ...] [--lines] [--json FILE] [--markdown] [--budgets [--write]]
A case is profiled if its name holds all the words: "pyramid_context_ bfloat16" 16x60x60. --lines lists where in the
sources the instructions are. --budgets takes the cases of scripts/sass/budgets.json, and ends with an error where one
needs more instructions a unit than is written there; --write writes what it needs now.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from execute import Executor, Launch
from launches import observing
from machine_code import ORDER, ROOT, Kernel, cubin_of, disassemble, find, kernels_of, resources
from workloads import Case, Work, build, cases

BUDGETS = Path(__file__).parent / "budgets.json"  # case -> instructions of a thread, a unit
SLACK = 1.03  # what another version of the compiler may add

# An H100 (SXM), by its documents but for the first two.
COPY, L2 = 3.0e12, 5.5e12  # bytes a second: of a copy, and between L2 and multiprocessors
PROCESSORS, CLOCK = 132, 1.75e9
# Warp instructions a cycle and multiprocessor: all, of the integer pipe, MUFU, m16n8k16 products (mma, not wgmma).
ISSUE, ALU, SPECIAL, TENSOR = 4, 2, 0.5, 0.6
LAUNCH = 3e-6  # of a kernel, until its first result
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 * 1024, 2048, 32  # of a multiprocessor
IN_FMA_PIPE = {"FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2"}  # the others of their kinds are the ALU's


@dataclass
class KernelProfile:
    """Of one launch, for the whole grid: counts of warps, seconds of each thing that could be the limit."""

    name: str
    grid: int
    threads: int
    registers: int
    shared: int
    occupancy: float  # of the warps that a multiprocessor can hold
    waves: float
    kinds: dict[str, float]
    sectors: float  # that requests touch, a request of a warp
    bytes_through_l1: float
    bytes_through_l2: float  # each sector once a block
    bank_conflicts: float  # passes through shared memory over the least
    largest_block: float  # its instructions over the mean
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Profile:
    """Of a case."""

    case: str
    unit: str
    floor: float  # seconds: bytes, or exponentials
    predicted: float
    limit: str
    instructions: float  # of a thread, a unit
    kinds: dict[str, float]  # the same by kind
    reread: float  # bytes between L2 and multiprocessors over those that must move
    kernels: list[KernelProfile]


@cache
def compiled(operator: str) -> tuple[dict[str, Kernel], dict[str, tuple[int, int]]]:
    """The kernels of an operator's sources by name, and by symbol their registers and static shared memory."""
    found: dict[str, Kernel] = {}
    used: dict[str, tuple[int, int]] = {}
    for source in (ROOT / "csrc" / "cuda").glob(f"{operator.removesuffix('_').removesuffix('_backward')}*.cu"):
        cubin = cubin_of(source)
        found |= {kernel.name: kernel for kernel in kernels_of(disassemble(cubin))}
        used |= resources(cubin)
    return found, used


def sample(executor: Executor, grid: int, most: int) -> float:
    """Runs blocks spread over the grid until their mean is known to 2 %; returns the largest block over the mean."""
    totals: list[int] = []
    for i in range(min(grid, most)):
        before = int(executor.counts.executed.sum())
        executor.run(int(grid * ((i * 0.6180339887 + 0.5) % 1)))
        totals.append(int(executor.counts.executed.sum()) - before)
        if len(totals) >= 3 and np.std(totals) / np.sqrt(len(totals)) < 0.02 * np.mean(totals):
            break
    return float(max(totals) / np.mean(totals))


def in_alu(operation: str, kind: str) -> bool:
    return (
        kind in ("integer", "arithmetic", "conversion", "move")
        and operation not in IN_FMA_PIPE
        and (not operation.startswith("U") and operation not in ("S2R", "CS2R", "LDC", "SHFL", "MUFU"))
    )


def profile_kernel(operator: str, launch: Launch, most: int, lines: Counter[str]) -> KernelProfile:
    found, used = compiled(operator)
    kernel = found[launch.name]
    executor = Executor(kernel, launch)
    grid, threads = int(np.prod(launch.grid)), int(np.prod(launch.block))
    largest = sample(executor, grid, most)
    counts = executor.counts
    scale = grid / counts.blocks
    kinds: Counter[str] = Counter()
    alu = 0.0
    for instruction, executed in zip(kernel.instructions, counts.executed.tolist(), strict=True):
        kinds[instruction.kind] += executed * scale
        lines[f"{instruction.source[0]}:{instruction.source[1]}"] += executed * scale
        if in_alu(instruction.operation, instruction.kind):
            alu += executed * scale
    registers, static = used[kernel.symbol]
    shared = static + launch.shared
    warps = ceil(threads / 32)
    resident = min(
        THREADS // (warps * 32), BLOCKS, REGISTERS // (ceil(registers / 8) * 8 * warps * 32), SHARED // (shared + 1024)
    )
    total = sum(kinds.values())
    # What is copied to shared memory passes by L1, and counts as it is written there.
    through_l1 = 32.0 * (sum(counts.requested.values()) - counts.requested["copy"]) * scale
    through_l2 = 32.0 * sum(counts.distinct.values()) * scale
    requests = sum(counts.requests.values())
    uneven = ceil(grid / PROCESSORS) * PROCESSORS / grid  # the busiest multiprocessor over the mean
    cycles = uneven / (PROCESSORS * CLOCK)
    seconds = {
        "issue": total / ISSUE * cycles,
        "integer pipe": alu / ALU * cycles,
        "special functions": kinds["special"] / SPECIAL * cycles,
        "matrix products": kinds["tensor"] / TENSOR * cycles,
        "L1 and shared": (counts.passes * scale + through_l1 / 128) * cycles,
        "L2": through_l2 / L2,
    }
    return KernelProfile(
        launch.name,
        grid,
        threads,
        registers,
        shared,
        resident * warps * 32 / THREADS,
        grid / (resident * PROCESSORS),
        {kind: kinds[kind] for kind in ORDER if kinds[kind]},
        sum(counts.requested.values()) / max(requests, 1),
        through_l1,
        through_l2,
        counts.passes / max(counts.least_passes, 1),
        largest,
        seconds,
    )


def profile(case: Case, most: int, lines: Counter[str]) -> Profile:
    work: Work = build(case)
    found: list[KernelProfile] = []

    def take(launch: Launch) -> bool:
        found.append(profile_kernel(case.operator, launch, most, lines))
        return True

    with observing(take), torch.no_grad():
        work.call()
    bytes_ = work.floor_bytes / COPY
    floor = max(bytes_, work.specials / 32 / SPECIAL / (PROCESSORS * CLOCK))
    # What must move is the limit of the kernels together, the rest of each on its own.
    main = max(found, key=lambda kernel: max(kernel.seconds.values()))
    limit = max(main.seconds, key=main.seconds.__getitem__)
    longest = sum(max(kernel.seconds.values()) for kernel in found)
    predicted = max(bytes_, longest) + LAUNCH * len(found)
    kinds: Counter[str] = Counter()
    for kernel in found:
        kinds.update(kernel.kinds)
    return Profile(
        str(case),
        work.unit,
        floor,
        predicted,
        limit if longest > bytes_ else "bytes",
        32 * sum(kinds.values()) / work.units,
        {kind: round(32 * count / work.units, 3) for kind, count in kinds.items()},
        sum(kernel.bytes_through_l2 for kernel in found) / work.floor_bytes,
        found,
    )


def show(p: Profile) -> None:
    kinds = ", ".join(f"{count:.2f} {kind}" for kind, count in sorted(p.kinds.items(), key=lambda item: -item[1]))
    print(
        f"{p.case}: floor {p.floor * 1e6:.1f} us, predicted {p.predicted * 1e6:.1f} us ({p.predicted / p.floor:.1f}x, "
        f"{p.limit}); {p.instructions:.2f} instructions a {p.unit}: {kinds}; read {p.reread:.2f} times"
    )
    for k in p.kernels:
        times = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in k.seconds.items())
        print(
            f"    {k.name}: {k.grid} x {k.threads}, {k.registers} registers, {k.shared} bytes shared, occupancy "
            f"{k.occupancy:.2f}, {k.waves:.1f} waves, {k.sectors:.1f} sectors a request, bank conflicts "
            f"{k.bank_conflicts:.2f}, largest block {k.largest_block:.2f}; us: {times}",
            flush=True,
        )


def print_table(profiles: list[Profile]) -> None:
    print("| case | floor us | predicted us | | limit | instructions a unit | read | occupancy |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for p in profiles:
        occupancy = ", ".join(f"{kernel.occupancy:.2f}" for kernel in p.kernels)
        print(
            f"| {p.case} | {p.floor * 1e6:.1f} | {p.predicted * 1e6:.1f} | {p.predicted / p.floor:.1f}x | {p.limit} | "
            f"{p.instructions:.1f} a {p.unit} | {p.reread:.2f}x | {occupancy} |"
        )


def over_budget(profiles: list[Profile], budgets: dict[str, float]) -> list[str]:
    """In words, the cases that take more than their budget."""
    return [
        f"{p.case} takes {p.instructions:.4g} instructions a {p.unit}, and may take {budgets[p.case]}"
        for p in profiles
        if p.instructions > SLACK * budgets.get(p.case, float("inf"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="as the tables of docs/kernels.md")
    parser.add_argument("--budgets", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--blocks", type=int, default=12, help="of each launch, at most (12)")
    parser.add_argument("--json", type=Path, help="adds everything to this file")
    args = parser.parse_args()
    if missing := [program for program in ("nvcc", "cuobjdump", "nvdisasm") if find(program) is None]:
        print(f"predict: skipped: there is no {missing[0]}")
        sys.exit(3)
    torch.set_num_threads(1)
    budgets: dict[str, float] = json.loads(BUDGETS.read_text()) if args.budgets else {}
    if unknown := budgets.keys() - {str(case) for case in cases()}:
        sys.exit(f"predict: no such case in {BUDGETS.name}: {', '.join(unknown)}")
    profiles = []
    for case in cases():
        if not all(word in str(case) for word in args.words) or (args.budgets and str(case) not in budgets):
            continue
        lines: Counter[str] = Counter()
        profiles.append(profile(case, args.blocks, lines))
        if not args.markdown:
            show(profiles[-1])
        if args.lines:
            for line, executed in lines.most_common(24):
                print(f"        {executed / sum(lines.values()):6.1%} {line}")
    if args.markdown:
        print_table(profiles)
    if args.json is not None:
        report = json.loads(args.json.read_text()) if args.json.exists() else {}
        report["profiles"] = [asdict(p) for p in profiles]
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.budgets and args.write:
        budgets |= {p.case: float(f"{p.instructions:.4g}") for p in profiles}
        BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n")
    elif exceeding := over_budget(profiles, budgets):
        sys.exit("predict: " + "; ".join(exceeding))


if __name__ == "__main__":
    main()
