"""Reads what ptxas said about each kernel (scripts/check_cuda.sh) and prints it as a table.

From the machine code for sm_90 also whether kernels that work on 16-byte vectors really load and store them, and that
none but those for float64 computes in double precision. Its disassembly needs cuobjdump and nvdisasm, of the toolkit or
of the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from sass.machine_code import demangle, disassemble, extract_cubin, find, kernels_of

ARCHITECTURE = 90  # of the machine code that is read

# Which kernels load ("L") and store ("S") device memory in 16-byte vectors by design: those for planes in every
# instance, the others in the instances whose vectors hold more than one element. Planes in units of a row have no such
# vectors in 16 bits: a row may be no whole number of them. Nor have the parts: four channels a thread are more threads.
WIDE = {
    "batch_norm_levels": "",
    "batch_norm_levels_backward": "",
    "context_backward_planes": "L",
    "context_backward_row_products": "S",
    "context_backward_rows": "LS",
    "context_backward_taps": "",
    "context_planes": "LS",
    "context_products": "",
    "context_rows": "LS",
    "argmax_columns": "",
    "argmax_pixels": "",
    "count_pixels": "",
    "cross_entropy_backward": "",
    "cross_entropy_pixels": "",
    "cross_entropy_total": "",
    "pool_backward_cells": "LS",
    "pool_backward_planes": "",
    "pool_bins": "L",
    "pool_cells": "LS",
    "pool_planes": "",
    "reduce": "LS",
    "reduce_backward": "LS",
    "softmax_columns": "",
    "softmax_pixels": "",
    "split_elements": "",
    "split_planes": "LS",
    "split_rows": "LS",
    "upsample_backward_cells": "",
    "upsample_backward_parts": "",
    "upsample_backward_planes": "",
    "upsample_planes": "",
    "upsample_rows": "LS",
}

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers.*")
SHARED = re.compile(r"(\d+) bytes smem")


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


def machine_code(file: Path) -> dict[str, dict[str, int]]:
    """kernel -> 16-byte loads and stores of device memory and double precision instructions, for ARCHITECTURE."""
    return {
        kernel.symbol: {
            "wide_loads": sum(i.operation in ("LDG", "LDGSTS") and "128" in i.modifiers for i in kernel.instructions),
            "wide_stores": sum(i.operation == "STG" and "128" in i.modifiers for i in kernel.instructions),
            "double": sum(i.double for i in kernel.instructions),
        }
        for kernel in kernels_of(disassemble(extract_cubin(file, ARCHITECTURE)))
    }


def missing_wide(kernel: str, loads: int, stores: int) -> str:
    """What a kernel lacks of WIDE, in words; empty if nothing."""
    name, width = kernel.split("<")[0], re.search(r", (\d+)(, true|, false)?>$", kernel)
    scalar = width.group(1) == "1" if width is not None else kernel.endswith(", false>")
    if name not in WIDE:
        return "entry in WIDE of scripts/check_cuda.py"
    expected = "" if scalar else WIDE[name]
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

    disassembles = find("cuobjdump") is not None and find("nvdisasm") is not None
    table: dict[tuple[str, int], dict[str, int]] = {}
    for log in sorted(args.folder.glob("*.log")):
        table |= resources(log.read_text())
        if disassembles:
            for symbol, counts in machine_code(log.with_suffix(".o")).items():
                table[symbol, ARCHITECTURE].update(counts)
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
        if not disassembles:
            continue
        code = table[kernel, ARCHITECTURE]
        if lacks := missing_wide(names[kernel], code["wide_loads"], code["wide_stores"]):
            failures.append(f"{names[kernel]} has no {lacks}")
        if code["double"] and "double" not in names[kernel]:
            failures.append(f"{names[kernel]} has {code['double']} instructions of double precision")
    if not disassembles:
        print("check_cuda: no cuobjdump or no nvdisasm: the machine code was not read")
    if args.json is not None:
        kernels = [{"kernel": names[k], "arch": a, **row} for (k, a), row in sorted(table.items())]
        args.json.write_text(json.dumps({"kernels": kernels}, indent=1) + "\n")
    if failures:
        sys.exit("check_cuda: " + "; ".join(failures))
    print(f"check_cuda: {len(mangled)} kernels for sm_{', sm_'.join(map(str, architectures))}: no warning, no spill")


if __name__ == "__main__":
    main()
