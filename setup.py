"""Builds the kernels: always for the CPU, and for CUDA where torch has it and nvcc is found.

USE_CUDA=auto|0|1 (default auto), TORCH_CUDA_ARCH_LIST, MAX_JOBS and DEBUG=1 are honoured; every decision is printed.
"""

import os
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: the wheel serves every later torch as well
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit(f"pspnet_fast needs torch >= 2.11 to build, but found torch {torch.__version__}")


def use_cuda() -> bool:
    """Whether to build the CUDA kernels, from USE_CUDA, torch and the toolkit."""
    wish = os.environ.get("USE_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1"):
        sys.exit(f"USE_CUDA must be auto, 0 or 1, but is {wish!r}")
    nvcc = CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()
    if wish == "1" and torch.version.cuda is None:
        sys.exit(f"USE_CUDA=1, but torch {torch.__version__} is a build without CUDA: install one with it or set USE_CUDA=0")
    if wish == "1" and not nvcc:
        sys.exit("USE_CUDA=1, but no nvcc was found: set CUDA_HOME to the CUDA toolkit's folder or set USE_CUDA=0")
    return wish != "0" and torch.version.cuda is not None and nvcc


def sources(*folders: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).glob(f"*{suffix}"))


WITH_CUDA = use_cuda()
DEBUG = os.environ.get("DEBUG", "0") == "1"
if WITH_CUDA and not torch.cuda.is_available():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
if WITH_CUDA:
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "of the GPUs visible to the build").replace(";", ", ")
    # the kernels, torch's own CUDA declarations, and what `pspnet-fast info` reports
    defines += ["-DPSPNET_FAST_WITH_CUDA", "-DUSE_CUDA", f"-DPSPNET_FAST_CUDA_ARCHITECTURES={architectures}"]
optimize = ["-O0", "-g"] if DEBUG else ["-O3"]
# Vectorisation needs to know that arithmetic neither traps nor sets errno; results are those of strict IEEE arithmetic.
cxx_flags = [*defines, *optimize, "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden"]
cxx_flags += ["-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-unused-parameter", "-Wno-psabi", "-Wno-unknown-pragmas"]
nvcc_flags = [*defines, *optimize, "--expt-relaxed-constexpr"]

extension = (CUDAExtension if WITH_CUDA else CppExtension)(
    "pspnet_fast._C",
    sources("csrc", "csrc/cpu", suffix=".cpp") + (sources("csrc/cuda", suffix=".cu") if WITH_CUDA else []),
    extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
    py_limited_api=True,
)


print(f"pspnet_fast: torch = {torch.__version__}, stable ABI of torch 2.11")
print(f"pspnet_fast: USE_CUDA = {os.environ.get('USE_CUDA', 'auto')} -> CUDA kernels {'on' if WITH_CUDA else 'off'}")
print(f"pspnet_fast: torch.version.cuda = {torch.version.cuda}, CUDA_HOME = {CUDA_HOME}")
print(f"pspnet_fast: TORCH_CUDA_ARCH_LIST = {os.environ.get('TORCH_CUDA_ARCH_LIST') if WITH_CUDA else 'not used'}")
print(f"pspnet_fast: MAX_JOBS = {os.environ['MAX_JOBS']}, DEBUG = {DEBUG}")

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
