"""The loops of a kernel's machine code, and their instructions by kind: python scripts/sass/loops.py SOURCE [KERNEL].

SOURCE is a file of csrc/cuda (its stem will do), KERNEL a part of the kernels' names with their template arguments.
Each loop is listed with what lies in it and in no loop inside it. With --code, its instructions as well.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from machine_code import ORDER, ROOT, Instruction, Kernel, compile_cubin, disassemble, kernels_of

ENDS = ("BRA", "BRX", "JMP", "EXIT", "RET")


@dataclass
class Loop:
    """First and last instruction (indices), and the loops it lies in."""

    first: int
    last: int
    depth: int = 0


def loops_of(kernel: Kernel) -> list[Loop]:
    """By backward branches: from a target to the last branch that goes back to it."""
    last: dict[int, int] = {}
    for i, instruction in enumerate(kernel.instructions):
        target = kernel.target(instruction) if instruction.operation == "BRA" else None
        if target is not None and target <= i and not (target == i and not instruction.guard):
            last[target] = max(i, last.get(target, i))
    loops = [Loop(first, end) for first, end in sorted(last.items())]
    for loop in loops:
        loop.depth = sum(o.first <= loop.first and loop.last <= o.last for o in loops if o is not loop)
    return loops


def own(kernel: Kernel, loop: Loop, loops: list[Loop]) -> list[Instruction]:
    """What lies in the loop and in no loop inside it."""
    inside = [o for o in loops if o is not loop and loop.first <= o.first and o.last <= loop.last]
    return [
        kernel.instructions[i]
        for i in range(loop.first, loop.last + 1)
        if not any(o.first <= i <= o.last for o in inside)
    ]


def summary(instructions: list[Instruction]) -> str:
    kinds = Counter(instruction.kind for instruction in instructions)
    operations = Counter(
        ".".join([i.operation, *(m for m in i.modifiers if m in ("128", "64", "EX2", "RCP"))])
        for i in instructions
        if i.kind in ("memory", "special", "tensor", "double")
    )
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ORDER if kinds[kind])
    detail = ", ".join(f"{count} {operation}" for operation, count in operations.items())
    return f"{len(instructions):4}: {counts}" + (f" ({detail})" if detail else "")


def lines_of(instructions: list[Instruction]) -> str:
    by_file: dict[str, set[int]] = {}
    for instruction in instructions:
        by_file.setdefault(instruction.source[0], set()).add(instruction.source[1])
    return ", ".join(f"{name} {min(lines)}-{max(lines)}" for name, lines in by_file.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("kernel", nargs="?", default="")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--code", action="store_true", help="list the instructions of the loops")
    args = parser.parse_args()
    source = ROOT / "csrc" / "cuda" / f"{Path(args.source).stem}.cu"
    for kernel in kernels_of(disassemble(compile_cubin(source, args.arch))):
        if args.kernel not in kernel.name:
            continue
        loops = loops_of(kernel)
        print(f"\n{kernel.name}: {summary(kernel.instructions)}")
        for loop in loops:
            instructions = own(kernel, loop, loops)
            first, last = (kernel.instructions[i].address for i in (loop.first, loop.last))
            indent = "  " * (loop.depth + 1)
            print(f"{indent}loop {first:#x}-{last:#x} {summary(instructions)}")
            print(f"{indent}     {lines_of(instructions)}")
            if args.code:
                print("\n".join(f"{indent}     {i}   {i.source[0]}:{i.source[1]}" for i in instructions))


if __name__ == "__main__":
    main()
