"""Writes docs/support.md: what each operator and module is tested on, read from the tests themselves.

A device, dtype or layout is in the tables if a test of that operator or module is parametrized with it; "compiled" and
"exported" if one of them does that. tests/test_support_matrix.py checks that the page is current.

python scripts/support_matrix.py
"""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from cases import DTYPES, LAYOUTS, OPERATORS  # noqa: E402
from conftest import DEVICES  # noqa: E402
from derivative_cases import CASES  # noqa: E402

MODULES = {
    "FusedPPM": "test_modules",
    "FusedPSPHead": "test_head",
    "FusedUpsampleConcat": "test_upsample_concat",
    "fuse": "test_fuse",
    "UpsampleCrossEntropyLoss": "test_losses",
    "UpsampleDiceLoss, UpsampleLovaszLoss": "test_region_losses",
}
DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}  # cuda_on_cpu is how the second is tested without a GPU
FORMATS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}
TEXT = """# What works where

Written by `python scripts/support_matrix.py` from the tests: a device, dtype or layout is here because a test is
parametrized with it. Those of CUDA run on a GPU where there is one, and everywhere on the CPU, from the same sources
(`tests/cuda_on_cpu`).

## Operators

Layouts are of maps and logits: slices are parts of larger tensors, of either memory format; others than these are
copied first. "compiled" is `torch.library.opcheck` (schema, fake tensors, autograd, the compiler's graphs with dynamic
sizes), or `torch.compile` with dynamic sizes. "backward" is a kernel's; of higher order: [derivatives](derivatives.md).

{operators}

## Modules

{modules}

They run in the dtypes of their operators, forward and backward. `PSPNet` is made of them. Under `torch.compile` a model
changed by `fuse` runs its own forward.
"""


def tests_of(module: ModuleType) -> Iterator[tuple[str, dict[str, list[object]]]]:
    """Each test's name and the values of its parameters."""
    for name, test in vars(module).items():
        if name.startswith("test_"):
            yield name, parameters(test)


def parameters(test: object) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for mark in getattr(test, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names, values = mark.args[:2]
        names = re.split(r",\s*", names) if isinstance(names, str) else list(names)
        rows = [row if len(names) > 1 else (row,) for row in values]
        found |= {name: [row[i] for row in rows] for i, name in enumerate(names)}
    if "device" in getattr(test, "__code__", parameters.__code__).co_varnames:
        found["device"] = list(DEVICES)
    return found


def row(module: ModuleType) -> list[str]:
    """Devices, dtypes, layouts, compiled."""
    tests = dict(tests_of(module))
    given: dict[str, set[object]] = {"device": {"cpu"}, "dtype": set(), "layout": set(), "memory_format": set()}
    for values in tests.values():
        for name in given.keys() & values.keys():
            given[name].update(values[name])
    dtypes = [dtype for dtype in DTYPES if dtype in given["dtype"]] or getattr(module, "INTEGERS", [])
    layouts = given["layout"] | given["memory_format"]
    layouts |= {layout for layout, _ in getattr(module, "LAYOUTS_AND_CHANNELS", [])}
    names = {FORMATS.get(layout, layout) for layout in layouts}  # type: ignore[call-overload]
    return [
        ", ".join(text for name, text in DEVICE_NAMES.items() if name in given["device"]),
        ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "-",
        ", ".join(name for name in LAYOUTS if name in names) or "-",
        "yes" if any(re.match("test_(opcheck|compiles)", name) for name in tests) else "no",
    ]


def exported(module: ModuleType) -> str:
    return "yes" if any("export" in name for name, _ in tests_of(module)) else "no"


def backward(operator: str) -> str:
    """By the derivative tests' cases, whose names start with the operator's."""
    cases = {name: case for name, case in CASES.items() if re.split("[, ]", name)[0] == operator}
    refused = [name for name, case in cases.items() if case.forward_only]
    if len(refused) == len(cases):
        return "no"
    return f"yes, not with {' or '.join(refused[0].split(', ')[1:])}" if refused else "yes"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    columns = ["devices", "dtypes", "layouts", "compiled"]
    operators = [
        [f"`{name}`", *row(importlib.import_module(f"test_{name.removesuffix('_')}")), backward(name)]
        for name in OPERATORS
    ]
    modules = []
    for name, file in MODULES.items():
        module = importlib.import_module(file)
        devices, _, layouts, compiled = row(module)
        modules.append([f"`{name}`", devices, layouts, compiled, exported(module)])
    return TEXT.format(
        operators=table(["operator", *columns, "backward"], operators),
        modules=table(["module", "devices", "layouts", "compiled", "exported"], modules),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
