"""Builds the CUDA sources for the CPU (README.md): the operators for torch, or the planted bugs as a program.

Results are kept in build/cuda_on_cpu/ under a name that depends on everything they are made from.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SANITIZERS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# Those whose kernels are compiled, and whose tests run: under a sanitizer each takes a minute to build, and float16
# shares the code of bfloat16.
ALL_DTYPES = ("float32", "float64", "bfloat16", "float16")
DTYPES = {"none": ALL_DTYPES, "address": ALL_DTYPES[:3], "thread": ALL_DTYPES[:3]}
NAMESPACE = "pspnet_fast_cuda_on_cpu"
# No strict aliasing: 16-byte accesses read elements as uint4, as nvcc allows. -Wno-unknown-pragmas: #pragma unroll.
# Sums of products become fused multiply-adds, as nvcc makes them; g++ does so with its expensive optimizations only.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-mfma",
    "-ffp-contract=fast",
    "-fexpensive-optimizations",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]


_failures: dict[Path, RuntimeError] = {}  # not tried again: hundreds of tests ask for the same library


class NotAvailable(Exception):
    """Why the CUDA sources cannot be built here."""


def sources() -> list[Path]:
    """The kernels, a file an operator."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def cuda_include() -> Path:
    """The CUDA toolkit's headers; nothing else of the toolkit is needed."""
    if platform.machine() != "x86_64":
        raise NotAvailable("the runtime is written for x86-64")
    for root in filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda")):
        if (Path(root) / "include" / "cuda_runtime.h").exists():
            return Path(root) / "include"
    raise NotAvailable("the CUDA headers were not found: set CUDA_HOME")


def preload(sanitizer: str) -> str:
    """LD_PRELOAD for a Python process that is to load a library built with this sanitizer."""
    names = {"none": [], "address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}[sanitizer]
    return " ".join(
        subprocess.run(
            [_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    )


@cache
def build_operators(sanitizer: str = "none") -> Path:
    """The library that registers every operator under torch.ops.pspnet_fast_cuda_on_cpu, for CPU tensors of DTYPES."""
    # Not optimized: under UndefinedBehaviorSanitizer torch's templates take three times as long with -O1; without, g++
    # does not see which paths end in an error.
    torch_flags = ["-O0", "-Wno-return-type", "-DPSPNET_FAST_CUDA_ON_CPU", f"-DPSPNET_FAST_NAMESPACE={NAMESPACE}"]
    torch_flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-missing-field-initializers"]
    torch_flags += [f"-isystem{path}" for path in include_paths()]
    dtypes = sum(1 << ALL_DTYPES.index(dtype) for dtype in DTYPES[sanitizer])
    units = {source: [f"-DPSPNET_FAST_DTYPES={dtypes}"] for source in sources()}
    bindings = [*sorted((ROOT / "csrc").glob("*.cpp")), ROOT / "csrc" / "cpu" / "isa.cpp"]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10", "-shared"]
    return _build("operators.so", units, sanitizer, libraries, dict.fromkeys(bindings, torch_flags))


def operators() -> list[str]:
    """Those that the library of build_operators, once loaded, has kernels for."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(name.split("::")[1] for name in registered if name.startswith(f"{NAMESPACE}::"))


@contextmanager
def instead_of_cpu_kernels() -> Iterator[None]:
    """Within it, pspnet_fast's operators on CPU tensors run the CUDA sources.

    CUDA_ON_CPU_SANITIZER=none|address|thread is what they are compiled with; the last two need `preload`.
    """
    torch.ops.load_library(build_operators(os.environ.get("CUDA_ON_CPU_SANITIZER", "none")))
    substitutes = getattr(torch.ops, NAMESPACE)
    library = torch.library.Library("pspnet_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that kernels are replaced: they are meant to be
        for name in operators():
            library.impl(name, getattr(substitutes, name).default, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def build_planted_bugs(sanitizer: str = "none") -> Path:
    """The program that runs one small kernel with the bug that its argument names."""
    return _build("planted_bugs", {HERE / "planted_bugs.cu": []}, sanitizer, [])


def _compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NotAvailable(f"the compiler {compiler} was not found")
    return compiler


def _build(
    name: str,
    kernels: dict[Path, list[str]],
    sanitizer: str,
    libraries: list[str],
    bindings: dict[Path, list[str]] | None = None,
) -> Path:
    """`kernels` and `bindings`: sources and their flags; the bindings begin with torch's headers, compiled once."""
    flags = [_compiler(), *FLAGS, f"-isystem{cuda_include()}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    device = ["-x", "c++", "-include", str(HERE / "device.h")]
    commands = {source: [*flags, *SANITIZERS[sanitizer], *extra, *device] for source, extra in kernels.items()}
    define = {"none": [], "address": ["-DCUDA_ON_CPU_ADDRESS"], "thread": ["-DCUDA_ON_CPU_THREAD"]}[sanitizer]
    commands |= {key: [*flags, *define, "-O2"] for key in (HERE / "fibers.cpp", HERE / "launch.cpp")}
    of_bindings = {source: [*flags, *SANITIZERS[sanitizer], *extra] for source, extra in (bindings or {}).items()}
    link = [_compiler(), *SANITIZERS[sanitizer]]

    inputs = sorted({*(ROOT / "csrc").rglob("*.*"), *HERE.glob("*.*")} - {Path(__file__)})
    settings = [*commands.items(), *of_bindings.items(), link, libraries, torch.__version__]
    identity = hashlib.sha256(repr(settings).encode())
    for path in inputs:
        if path.suffix in (".cu", ".cuh", ".h", ".cpp"):
            identity.update(path.read_bytes())
    result = ROOT / "build" / "cuda_on_cpu" / identity.hexdigest()[:16] / name
    if result.exists():
        return result
    if result in _failures:
        raise _failures[result]

    result.parent.mkdir(parents=True, exist_ok=True)
    with open(result.parent / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=result.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of pytest-xdist ask for the same
        if not result.exists():
            try:
                made = _compile(Path(folder), commands, of_bindings, [*link, *libraries])
            except RuntimeError as error:
                _failures[result] = error
                raise
            made.rename(result)  # whole, or not at all
    return result


def _compile(folder: Path, commands: dict[Path, list[str]], bindings: dict[Path, list[str]], link: list[str]) -> Path:
    objects = {source: str(folder / f"{i}.o") for i, source in enumerate([*commands, *bindings])}
    header = folder / "bindings.h"
    header.write_text(f'#include "{ROOT}/csrc/tensors.h"\n')

    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_all(commands: dict[Path, list[str]], *more: str) -> list[Future[None]]:
            return [pool.submit(_run, [*c, *more, str(s), "-o", objects[s]]) for s, c in commands.items()]

        for command in [*bindings.values()][:1]:
            precompiled = pool.submit(_run, [*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
        compiled = compile_all(commands, "-c")
        if bindings:
            precompiled.result()
        for done in [*compiled, *compile_all(bindings, "-include", str(header), "-c")]:
            done.result()
    made = folder / "made"
    _run([link[0], *objects.values(), *link[1:], "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
