"""Builds the kernels: always for the CPU, and for CUDA where torch has it and its toolkit is found.

USE_CUDA=auto|0|1 (default auto), TORCH_CUDA_ARCH_LIST, MAX_JOBS and DEBUG=0|1 are honoured; every decision is printed.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths
except ImportError as error:
    sys.exit(f"pspnet_fast needs torch >= 2.11 to build ({error}): pip install 'torch>=2.11'")

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit(f"pspnet_fast needs torch >= 2.11 to build, but found {torch.__version__}: pip install -U 'torch>=2.11'")

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: the wheel serves every later torch as well
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def switch(name: str, *allowed: str) -> str:
    """The environment variable, by default the first value allowed."""
    value = os.environ.get(name, "").lower() or allowed[0]
    if value not in allowed:
        sys.exit(f"{name} must be one of {', '.join(allowed)}, but is {value!r}")
    return value


# What the kernels need of the language: C++20, and g++'s vectors.
CXX_PROBE = """
#include <bit>
#include <vector>
typedef float Floats __attribute__((vector_size(64)));
typedef int Ints __attribute__((vector_size(64)));
Floats shuffle(Floats v, Ints at) { return __builtin_shuffle(v, at + static_cast<int>(std::bit_width(1u))); }
"""
CUDA_PROBE = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_runtime.h>\n"
CXX = shlex.split(os.environ.get("CXX") or "c++")  # torch's choice


def compiles(command: list[str], suffix: str, text: str) -> str | None:
    """What the compiler says if it cannot make an object of this text: the first line that tells an error."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"probe{suffix}")
        source.write_text(text)
        try:
            done = subprocess.run([*command, str(source), "-o", f"{source}.o"], capture_output=True, text=True)
        except OSError as error:
            return f"it cannot be run ({error.strerror})"
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"it ends with status {done.returncode}"]
    return next((line for line in lines if "error" in line.lower()), lines[0]) if done.returncode else None


def missing_for_cuda() -> str | None:
    """Why the CUDA kernels cannot be built, if so."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.exists():
        return "no nvcc was found on PATH or in CUDA_HOME"
    try:
        said = subprocess.check_output([nvcc, "--version"], text=True, stderr=subprocess.STDOUT)
    except (OSError, subprocess.CalledProcessError):
        return f"{nvcc} cannot be run"
    found = re.search(r"release ([\d.]+)", said)
    release = found[1] if found else "unknown"
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {release}, but torch {torch.__version__} of CUDA {torch.version.cuda}"
    # An nvcc alone, or a link to one elsewhere, is no toolkit: the C++ sources want its headers too.
    folders = [f"-I{folder}" for folder in include_paths("cuda")]
    if problem := compiles([*CXX, *folders, "-E"], ".cpp", CUDA_PROBE):
        return f"the toolkit of {nvcc} lacks headers ({problem.strip()}; CUDA_HOME names another)"
    return None


def check_cxx() -> None:
    """Stops with one sentence where the compiler is missing or of no use, before the build prints hundreds of lines."""
    if problem := compiles([*CXX, "-std=c++20", "-c"], ".cpp", CXX_PROBE):
        sys.exit(
            f"pspnet_fast needs g++ >= 11 to build, but {shlex.join(CXX)!r} will not do: {problem.strip()}. Install it "
            "(apt-get install g++, dnf install gcc-c++, conda install gxx) or name one in CXX"
        )


def check_nvcc(nvcc: Path) -> None:
    """Likewise for nvcc."""
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []  # torch's choice
    if problem := compiles([str(nvcc), *host, "-std=c++17", "-c", "-E"], ".cu", ""):
        sys.exit(
            f"{nvcc} does not work with this C++ compiler: {problem.strip()}. Name one that it takes in CC and CXX, or "
            "set USE_CUDA=0 to build the CPU kernels alone"
        )


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(f"*{suffix}"))


class BuildKernels(BuildExtension):
    """Keeps the objects between builds, apart for each torch: a changed source compiles alone."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_temp = str(ROOT / "build" / f"torch-{torch.__version__}")


use_cuda, debug = switch("USE_CUDA", "auto", "0", "1"), switch("DEBUG", "0", "1") == "1"
check_cxx()
missing = missing_for_cuda()
if use_cuda == "1" and missing:
    sys.exit(f"USE_CUDA=1, but {missing}: mend that, or set USE_CUDA=0 to build the CPU kernels alone")
with_cuda = use_cuda != "0" and not missing
if with_cuda:
    check_nvcc(Path(CUDA_HOME, "bin", "nvcc"))
os.environ["MAX_JOBS"] = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
if with_cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
    os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCHITECTURES
architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or "of the visible GPUs"

defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
if with_cuda:
    # the kernels, torch's own CUDA declarations, and what `pspnet-fast info` reports
    defines += ["-DPSPNET_FAST_WITH_CUDA", "-DUSE_CUDA"]
    defines += [f"-DPSPNET_FAST_CUDA_ARCHITECTURES={architectures.replace(';', ' ')}"]
optimize = ["-O0"] if debug else ["-O3"]
# Vectorisation needs to know that arithmetic neither traps nor sets errno; results are those of strict IEEE arithmetic.
cxx_flags = ["-std=c++20", *defines, *optimize, "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
cxx_flags += ["-g" if debug else "-g0"]  # most Pythons' own flags ask for -g, which triples the library
cxx_flags += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-unused-parameter"]
cxx_flags += ["-Wno-psabi", "-Wno-unknown-pragmas"]
nvcc_flags = ["-std=c++17", *defines, *optimize]

print(f"pspnet_fast: torch {torch.__version__} at {Path(torch.__file__).parent}")
print(f"pspnet_fast: USE_CUDA={use_cuda}: CUDA kernels {'on' if with_cuda else f'off ({missing or use_cuda})'}")
if with_cuda:
    print(f"pspnet_fast: CUDA_HOME={CUDA_HOME}, CUDA {torch.version.cuda}, TORCH_CUDA_ARCH_LIST={architectures}")
print(f"pspnet_fast: MAX_JOBS={os.environ['MAX_JOBS']}, DEBUG={int(debug)}")

setup(
    license="BSD-3-Clause",  # here, not in pyproject.toml, where no one form is valid for both old and new setuptools
    ext_modules=[
        (CUDAExtension if with_cuda else CppExtension)(
            "pspnet_fast._C",
            sources("csrc", ".cpp") + sources("csrc/cpu", ".cpp") + (sources("csrc/cuda", ".cu") if with_cuda else []),
            extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
