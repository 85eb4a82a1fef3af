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
from pathlib import Path

# Which kernels load ("L") and store ("S") device memory in 16-byte vectors by design: those for planes in every
# instance, the others in the instances whose vectors hold more than one element.
WIDE = {
    "context_backward_planes": "L",
    "context_backward_rows": "LS",
    "context_backward_taps": "",
    "context_planes": "LS",
    "context_rows": "LS",
    "argmax_pixels": "L",
    "count_pixels": "",
    "pool_backward_cells": "LS",
    "pool_backward_planes": "LS",
    "pool_bins": "L",
    "pool_cells": "LS",
    "pool_planes": "LS",
    "reduce": "L",
    "reduce_backward": "LS",
    "softmax_pixels": "L",
    "upsample_backward_cells": "",
    "upsample_backward_parts": "L",
    "upsample_backward_planes": "L",
    "upsample_planes": "S",
    "upsample_rows": "LS",
}

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


def wide_accesses(cuobjdump: Path, file: Path) -> dict[tuple[str, int], dict[str, int]]:
    """(mangled kernel, architecture) -> 16-byte loads and stores of device memory in its disassembly."""
    command = ["env", f"PATH={cuobjdump.parent}:/usr/bin:/bin", str(cuobjdump), "-sass", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, int], dict[str, int]] = {}
    arch, kernel = 0, ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match.group(1))
        elif match := re.search(r"Function : (\S+)", line):
            kernel = match.group(1)
            found[kernel, arch] = {"wide_loads": 0, "wide_stores": 0}
        elif match := re.search(r"\b(LDG|STG)\.\S*128", line):
            found[kernel, arch]["wide_loads" if match.group(1) == "LDG" else "wide_stores"] += 1
    return found


def missing_wide(kernel: str, loads: int, stores: int) -> str:
    """What a kernel lacks of WIDE, in words; empty if nothing."""
    name, width = kernel.split("<")[0], re.search(r", (\d+)>$", kernel)
    if name not in WIDE:
        return "entry in WIDE of scripts/check_cuda.py"
    expected = "" if width is not None and int(width.group(1)) == 1 else WIDE[name]
    lacks = [
        f"16-byte {access}"
        for letter, access, count in (("L", "loads", loads), ("S", "stores", stores))
        if letter in expected and not count
    ]
    return " and ".join(lacks)


def cell(row: dict[str, int]) -> str:
    text = "/".join(str(row[field]) for field in ("registers", "shared", "stack", "spills"))
    return text + (f" {row['wide_loads']}+{row['wide_stores']}" if "wide_loads" in row else "")


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
                found[key].update(count)
        table.update(found)
    mangled = sorted({kernel for kernel, _ in table})
    names = dict(zip(mangled, demangle(mangled), strict=True))
    architectures = sorted({arch for _, arch in table})

    width = max(map(len, names.values()))
    print("registers of a thread / static shared memory / stack / spills, in bytes, and 16-byte loads + stores")
    print(f"{'':{width}}", *(f"{f'sm_{arch}':>20}" for arch in architectures))
    failures = []
    for kernel in sorted(mangled, key=names.__getitem__):
        rows = [table[kernel, arch] for arch in architectures]
        print(f"{names[kernel]:{width}}", *(f"{cell(row):>20}" for row in rows))
        if any(row["stack"] or row["spills"] for row in rows):
            failures.append(f"{names[kernel]} uses local memory")
        wide = [min(row.get(field, -1) for row in rows) for field in ("wide_loads", "wide_stores")]
        if cuobjdump is not None and (lacks := missing_wide(names[kernel], *wide)):
            failures.append(f"{names[kernel]} has no {lacks}")
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
