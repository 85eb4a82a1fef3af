"""Launches of the CUDA sources as their host code makes them, without a GPU (tests/cuda_on_cpu)."""

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from execute import Launch
from machine_code import ROOT, demangle

sys.path.insert(0, str(ROOT / "tests"))
from cuda_on_cpu import backend

OBSERVER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)
EXPORTED = "cuda_on_cpu_observe"


def functions(library: Path) -> dict[int, str]:
    """Kernels by their offset in the library, and what is exported to find it by."""
    lines = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.split() for line in lines if re.search(r" [tT] (_ZN11pspnet_fast4cuda12_GLOBAL|cuda_on_cpu)", line)]
    names = demangle([symbol for _, _, symbol in found])
    return {int(offset, 16): name for (offset, _, _), name in zip(found, names, strict=True)}


@contextmanager
def observing(take: Callable[[Launch], bool]) -> Iterator[None]:
    """Within it, pspnet_fast's operators on CPU tensors make the CUDA sources' launches, told to `take` beforehand.

    True from it: the launch is not executed by other means.
    """
    library = backend.build_operators()
    names = functions(library)
    errors: list[BaseException] = []

    def observe(kernel: int, sizes: "ctypes._Pointer[ctypes.c_uint]", shared: int, parameters: int, size: int) -> int:
        name = names[kernel - base]
        launch = Launch(name, tuple(sizes[0:3]), tuple(sizes[3:6]), shared, ctypes.string_at(parameters, size))
        try:
            return int(take(launch))
        except BaseException as error:  # raised where Python can raise it
            errors.append(error)
            return 1

    with backend.instead_of_cpu_kernels():
        loaded = ctypes.CDLL(str(library))
        start = ctypes.cast(loaded[EXPORTED], ctypes.c_void_p).value
        base = (start or 0) - next(offset for offset, name in names.items() if name == EXPORTED)
        callback = OBSERVER(observe)
        loaded[EXPORTED](callback)
        try:
            yield
        finally:
            loaded[EXPORTED](None)
    if errors:
        raise errors[0]
