"""Compiles the bindings, links the extension and imports it under CUDA builds of torch, the oldest and the newest.

The wheels of torch are downloaded once, without what they depend on (build/torch_cuda/). What the CUDA libraries among
that would define is stubbed: nothing is called, since there is no GPU. The kernels come as objects: of the CUDA sources
from FOLDER, where scripts/compile_cuda.sh compiled them, of the CPU's from the build of this checkout.
Exit 3: nothing could be checked, for want of network or of a toolkit that fits.
"""

import argparse
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "build" / "torch_cuda"
VERSIONS = ("2.11.0", "2.14.1")  # the oldest that is promised, the newest that was tried
LIBRARIES = ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")
STUBBED = re.compile(r"lib(cu(?!dart)|nccl|nvrtc|nvshmem_host|nvJitLink)\S*\.so\S*")
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += [
    "-Wno-missing-field-initializers",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-DPSPNET_FAST_WITH_CUDA",
    "-DUSE_CUDA",
]
FLAGS += ["-DPSPNET_FAST_CUDA_ARCHITECTURES=9.0", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CPU_SAMPLE = "confusion_matrix.cpp"  # compiled with each torch: it includes what all of csrc/cpu do
COMPILER = os.environ.get("CXX", "g++")
IMPORT = """
import torch
from pspnet_fast import info
registrations = torch._C._dispatch_get_registrations_for_dispatch_key
registered = {
    key: {name for name in registrations(key) if name.startswith("pspnet_fast::")} for key in ("CPU", "CUDA")
}
assert registered["CUDA"] and registered["CPU"] == registered["CUDA"], registered
print(f"torch {torch.__version__}: built, linked and imported, {len(registered['CUDA'])} operators for CUDA")
"""


class Skipped(Exception):
    """Why a check cannot be made here."""


def run(command: list[object], **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"check_torch: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def fetch(version: str, python: str = sys.executable) -> Path:
    """The folder that holds this torch, as on sys.path, for a Python."""
    minor = run([python, "-c", "import sys; print(sys.version_info[1])"]).strip()
    name = version if int(minor) == sys.version_info[1] else f"{version}-cp3{minor}"
    return download(version, WHEELS / name, python, ["--only-binary=:all:"])


def download(version: str, folder: Path, python: str, options: list[str]) -> Path:
    """The folder, once it holds the torch that this Python's pip takes by these options, as on sys.path."""
    if (folder / "whole").exists():
        return folder
    print(f"check_torch: downloads torch {version}, half a gigabyte", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [python, "-m", "pip", "download", "--no-deps", *options, f"torch=={version}"]
    done = subprocess.run([*command, "--quiet", f"--dest={folder}"], capture_output=True, text=True)
    wheel = next(folder.glob("torch-*.whl"), None)
    if done.returncode != 0 or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise Skipped(f"torch {version} could not be downloaded ({reason})")
    with zipfile.ZipFile(wheel) as archive:
        unneeded = ("torch/bin/", "torch/include/ATen/", "torch/include/google/")
        needed = "torch/bin/torch_shm_manager"  # torch looks whether it is there
        names = [name for name in archive.namelist() if name == needed or not name.startswith(unneeded)]
        archive.extractall(folder, names)
    wheel.unlink()
    (folder / "whole").touch()
    return folder


def stub_libraries(torch_libraries: Path, folder: Path, compiler: str = COMPILER) -> None:
    """What torch's libraries need of CUDA's, but for its runtime: libraries of the same names, symbols and versions.

    A call of such a symbol ends the process: it is data, which no processor executes.
    """
    folder.mkdir(exist_ok=True)
    names: set[str] = set()  # of libraries
    symbols: dict[str, set[str]] = {}  # by version
    versions: dict[str, str] = {}  # to library
    for library in torch_libraries.glob("*.so*"):
        names |= {name for name in re.findall(r"NEEDED.*\[(.*)\]", run(["readelf", "-d", library]))}
        file = ""
        for found in re.finditer(r"(File|Name): (\S+)", run(["readelf", "-V", library])):
            if found[1] == "File":
                file = found[2]
            else:
                versions[found[2]] = file
        for symbol in re.findall(r" [Uw] (\S+)", run(["nm", "-D", "--undefined-only", library])):
            name, _, version = symbol.partition("@")
            symbols.setdefault(version, set()).add(name)
    for library in sorted(name for name in names if STUBBED.fullmatch(name)):
        own = {version: symbols.get(version, set()) for version, file in versions.items() if file == library}
        defined = set().union(*own.values()) if own else {name for name in symbols[""] if name.startswith(("cu", "nc"))}
        source, script = folder / "stub.s", folder / "stub.map"
        labels = [f".globl {name}\n.type {name}, @function\n{name}:" for name in sorted(defined)]
        source.write_text("\n".join([".data", *labels, ".quad 0", '.section .note.GNU-stack,"",@progbits', ""]))
        script.write_text("".join(f"{v} {{ global: {' '.join(f'{n};' for n in sorted(own[v]))} }};\n" for v in own))
        versioned = [f"-Wl,--version-script={script}"] if own else []
        run([compiler, "-shared", "-nostdlib", source, *versioned, f"-Wl,-soname={library}", "-o", folder / library])


def check(version: str, kernels: list[Path], cuda: Path) -> str:
    torch = fetch(version)
    built_for = re.search(r"cuda: Optional\[str\] = '(\d+)", (torch / "torch" / "version.py").read_text())
    if built_for is None or not (cuda / "lib64" / f"libcudart.so.{built_for[1]}").exists():
        raise Skipped(f"torch {version} is built for CUDA {built_for and built_for[1]}, the toolkit is of another")
    if not (torch / "stubs").exists():
        stub_libraries(torch / "torch" / "lib", torch / "stubs")
    out = WHEELS / f"extension-{version}"
    (out / "pspnet_fast").mkdir(parents=True, exist_ok=True)
    include = [f"-isystem{torch}/torch/include", f"-isystem{cuda}/include"]

    # torch's headers once for all sources
    header = out / "tensors.h"
    header.write_text(f'#include "{ROOT}/csrc/tensors.h"\n')
    run([COMPILER, *FLAGS, *include, f"-I{ROOT}/csrc", "-x", "c++-header", header, "-o", f"{header}.gch"])
    sources = [*sorted((ROOT / "csrc").glob("*.cpp")), ROOT / "csrc" / "cpu" / CPU_SAMPLE]
    objects = {source: out / f"{i}.o" for i, source in enumerate(sources)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(
                lambda item: run([COMPILER, *FLAGS, *include, "-include", header, "-c", item[0], "-o", item[1]]),
                objects.items(),
            )
        )
    library = out / "pspnet_fast" / "_C.abi3.so"
    folders = [torch / "torch" / "lib", cuda / "lib64"]
    link = [COMPILER, "-shared", *objects.values(), *kernels, *(f"-L{folder}" for folder in folders)]
    run([*link, *(f"-l{name}" for name in (*LIBRARIES, "cudart")), "-o", library])

    for path in (ROOT / "pspnet_fast").iterdir():
        link_to = out / "pspnet_fast" / path.name
        if path.suffix != ".so" and path.name != "__pycache__" and not link_to.exists():
            link_to.symlink_to(path)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(out), str(torch)]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(torch / "stubs"), str(cuda / "lib64")]),
    }
    return run([sys.executable, "-c", IMPORT], env=environment, cwd=out).strip()


def cpu_kernels() -> list[Path]:
    """Those that pip or setup.py compiled in this checkout, but for the sample."""
    sources = sorted(path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path.name != CPU_SAMPLE)
    for folder in sorted((ROOT / "build").glob("torch-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        objects = [folder / "csrc" / "cpu" / f"{source.stem}.o" for source in sources]
        if all(path.exists() for path in objects):
            return objects
    raise Skipped("the CPU kernels are not built here: pip install -e .")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds an object of each CUDA source")
    parser.add_argument("--cuda", type=Path, required=True, help="the CUDA toolkit")
    parser.add_argument("--sample", type=int, metavar="NUMBER", help="only one of the two, by turns of the number")
    args = parser.parse_args()
    versions = VERSIONS if args.sample is None else VERSIONS[args.sample % len(VERSIONS) :][:1]
    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    checked = 0
    for version in versions:
        try:
            kernels = [*cpu_kernels(), *(args.folder / f"{source.stem}.o" for source in cuda_sources)]
            print(f"check_torch: {check(version, kernels, args.cuda)}", flush=True)
            checked += 1
        except Skipped as reason:
            print(f"check_torch: skipped: {reason}", flush=True)
    sys.exit(0 if checked == len(versions) else 3)


if __name__ == "__main__":
    main()
