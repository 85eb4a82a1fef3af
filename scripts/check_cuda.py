"""Reads what ptxas said about each kernel (scripts/check_cuda.sh) and prints it as a table.

With cuobjdump at hand (it comes inside the triton wheel), also whether kernels that work on 16-byte vectors really
load and store them.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers.*")
SHARED = re.compile(r"(\d+) bytes smem")


def demangle(names: list[str]) -> list[str]:
    """Kernel names with their template arguments, without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    lines = [line.replace("pspnet_fast::cuda::(anonymous namespace)::", "") for line in text.splitlines()]
    return [re.sub(r"^void |\(pspnet_fast::.*", "", line) for line in lines]


def resources(log: str) -> dict[tuple[str, int], dict[str, int]]:
    """(mangled kernel, architecture) -> registers, static shared memory, stack and spill bytes."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    for chunk in re.split(r"(?=ptxas info +: Compiling entry function)", log)[1:]:
        entry, stack, used = ENTRY.search(chunk), STACK.search(chunk), USED.search(chunk)
        if entry is None or stack is None or used is None:
            sys.exit(f"check_cuda: cannot read what ptxas wrote:\n{chunk}")
        shared = SHARED.search(used.group(0))
        found[entry.group(1), int(entry.group(2))] = {
            "registers": int(used.group(1)),
            "shared": int(shared.group(1)) if shared else 0,
            "stack": int(stack.group(1)),
            "spills": int(stack.group(2)) + int(stack.group(3)),
        }
    return found


def find_cuobjdump() -> Path | None:
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return Path(on_path)
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def wide_accesses(cuobjdump: Path, file: Path) -> dict[tuple[str, int], int]:
    """(mangled kernel, architecture) -> 16-byte accesses to device memory in its disassembly."""
    command = ["env", f"PATH={cuobjdump.parent}:/usr/bin:/bin", str(cuobjdump), "-sass", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, int], int] = defaultdict(int)
    arch, kernel = 0, ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match.group(1))
        elif match := re.search(r"Function : (\S+)", line):
            kernel = match.group(1)
            found[kernel, arch] += 0
        elif re.search(r"\b(LDG|STG)\.\S*128", line):
            found[kernel, arch] += 1
    return found


def works_on_vectors(kernel: str) -> bool:
    """By design: planar kernels of large maps, and every instance whose last template argument is above 1."""
    width = re.search(r", (\d+)>$", kernel)
    return int(width.group(1)) > 1 if width else kernel.split("<")[0].endswith("_planes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds NAME.log and NAME.o of each source")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()

    table: dict[tuple[str, int], dict[str, int]] = {}
    cuobjdump = find_cuobjdump()
    for log in sorted(args.folder.glob("*.log")):
        found = resources(log.read_text())
        if cuobjdump is not None:
            for key, count in wide_accesses(cuobjdump, log.with_suffix(".o")).items():
                found[key]["wide"] = count
        table.update(found)
    mangled = sorted({kernel for kernel, _ in table})
    names = dict(zip(mangled, demangle(mangled), strict=True))
    architectures = sorted({arch for _, arch in table})

    width = max(map(len, names.values()))
    head = " ".join(f"{f'sm_{arch}':>6}" for arch in architectures)
    print(f"{'registers of a thread':{width}} {head} {'shared':>7} {'stack':>6} {'spills':>7} {'16-byte':>8}")
    failures = []
    for kernel in sorted(mangled, key=names.__getitem__):
        rows = [table[kernel, arch] for arch in architectures]
        registers = " ".join(f"{row['registers']:6d}" for row in rows)
        wide = min((row["wide"] for row in rows if "wide" in row), default=None)
        most = {field: max(row[field] for row in rows) for field in ("shared", "stack", "spills")}
        print(
            f"{names[kernel]:{width}} {registers} {most['shared']:7d} {most['stack']:6d} {most['spills']:7d} "
            f"{'-' if wide is None else wide:>8}"
        )
        if most["stack"] or most["spills"]:
            failures.append(f"{names[kernel]} uses local memory")
        if wide == 0 and works_on_vectors(names[kernel]):
            failures.append(f"{names[kernel]} has no 16-byte access")
    if cuobjdump is None:
        print("check_cuda: no cuobjdump: 16-byte accesses were not checked")
    if args.json is not None:
        args.json.write_text(
            json.dumps([{"kernel": names[k], "arch": a, **row} for (k, a), row in sorted(table.items())], indent=1)
            + "\n"
        )
    if failures:
        sys.exit("check_cuda: " + "; ".join(failures))
    print(f"check_cuda: {len(mangled)} kernels for sm_{', sm_'.join(map(str, architectures))}: no warning, no spill")


if __name__ == "__main__":
    main()
