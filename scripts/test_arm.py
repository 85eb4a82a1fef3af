"""The kernels on ARM: compiled for aarch64, where the portable build serves, and tested under qemu's user mode.

By default a sample of the operators' tests runs; TEST, as test_pyramid_pool.py, names others.
Needs Debian's qemu-user-static and g++-aarch64-linux-gnu, and the network the first time: into build/arm/ go Debian's
Python for arm64 (by a state of apt's own, so that this machine's packages stay as they are), torch for aarch64 of this
environment's version, half a gigabyte, with stubs of CUDA's libraries, and what the tests import. setup.py compiles,
so the flags are those of every build. It shows what is right there, not what is fast.
Exit 3: nothing could be tested, for want of a package or of network.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import check_torch
import installed_tests
import torch
from check_torch import Skipped

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "arm"
COMPILER = "aarch64-linux-gnu-g++"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux2014_aarch64")
DEBIAN = ["python3", "libstdc++6"]
NEEDED = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools<82"]  # by torch
NEEDED += ["numpy", "click>=8", "pytest>=8"]
# What qemu does not tell of its processor, and torch reads: without these files it dies of the host's.
PROCESSOR = "neoverse-n1"
FEATURES = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
CPUINFO = f"""processor\t: 0
Features\t: {FEATURES}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
DEVICES = "sys/devices/system/cpu/"
TOLD = {"proc/cpuinfo": CPUINFO, f"{DEVICES}cpu0/regs/identification/midr_el1": "0x00000000414fd0c1\n"}
TOLD |= {f"{DEVICES}{name}": "0\n" for name in ("possible", "present", "online")} | {f"{DEVICES}kernel_max": "1\n"}


def run(*command: object, **options: object) -> str:
    """Its output; ends with what it said where it fails."""
    return check_torch.run(list(command), **options)


def fetched(*command: object) -> None:
    """A command that needs the network."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        reason = ((done.stderr or done.stdout).strip().splitlines() or ["it says nothing"])[-1]
        raise Skipped(f"{command[0]} cannot fetch what is needed ({reason})")


def system() -> Path:
    """A folder with Debian's arm64 Python and the libraries that it needs."""
    root, apt = BUILD / "root", BUILD / "apt"
    if (root / "whole").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # no package is installed
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    fetched("apt-get", *options, "update")
    fetched("apt-get", *options, "install", "--download-only", "--yes", "--no-install-recommends", *DEBIAN)
    for package in (apt / "cache" / "archives").glob("*.deb"):
        run("dpkg-deb", "--extract", package, root)
    for name, text in TOLD.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "whole").touch()
    return root


def packages(version: str) -> Path:
    """What torch and the tests import, for that Python."""
    folder = BUILD / f"packages-{version}"
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, *for_arm(version)]
        fetched(*pip, *NEEDED)
        fetched(*pip, "--no-deps", "nvidia-cuda-runtime>=13,<14")
        (folder / "whole").touch()
    return folder


def for_arm(version: str) -> list[str]:
    """pip's options."""
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    return [*platforms, f"--python-version={version}", "--only-binary=:all:"]


def build(libraries: Path) -> Path:
    """The package with its kernels, by setup.py and this environment's headers of torch, against torch's libraries."""
    print("test_arm: compiles, 2 to 10 minutes the first time", flush=True)
    out = BUILD / "package"
    linker = f"{COMPILER} -shared"
    variables = {"CXX": COMPILER, "LDSHARED": linker, "LDCXXSHARED": linker, "LDFLAGS": f"-L{libraries}"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja's
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", out]
    environment = os.environ | variables | {"USE_CUDA": "0", "PATH": path}
    run(*command, "--build-temp", BUILD / "objects", cwd=ROOT, env=environment)
    unneeded = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pspnet_fast", out / "pspnet_fast", ignore=unneeded, dirs_exist_ok=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=installed_tests.files(installed_tests.OPERATORS), metavar="TEST")
    parser.add_argument("--all", action="store_true", help="all cases of each test")
    arguments = parser.parse_args()
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    try:
        if emulator is None:
            raise Skipped("there is no qemu-aarch64: apt-get install qemu-user-static")
        if not shutil.which(COMPILER):
            raise Skipped(f"there is no {COMPILER}: apt-get install g++-aarch64-linux-gnu")
        if not shutil.which("apt-get"):
            raise Skipped("there is no apt-get: Python for arm64 comes from Debian")
        root = system()
        version = (root / "usr" / "bin" / "python3").readlink().name.removeprefix("python")
        imported = packages(version)
        release = torch.__version__.split("+")[0]
        other = check_torch.download(release, BUILD / f"torch-{release}", sys.executable, for_arm(version))
    except Skipped as reason:
        print(f"test_arm: skipped: {reason}")
        sys.exit(3)
    libraries, stubs = other / "torch" / "lib", other / "stubs"
    if not stubs.exists():
        check_torch.stub_libraries(libraries, stubs, COMPILER)
    package = build(libraries)

    tests = BUILD / "tests"
    shutil.rmtree(tests, ignore_errors=True)
    installed_tests.copy(tests)
    cuda = next(imported.glob("nvidia/*/lib/libcudart.so.*")).parent
    python = [emulator, "-cpu", PROCESSOR, "-L", root, "-E", f"LD_LIBRARY_PATH={stubs}:{cuda}"]
    python += [root / "usr" / "bin" / "python3", "-S"]  # without the host's packages, where Debian's Python looks
    environment = {"PYTHONPATH": f"{package}:{other}:{imported}", "OMP_NUM_THREADS": "1", "HOME": str(BUILD)}
    options = {"env": os.environ | environment, "cwd": tests}
    print(run(*python, "-m", "pspnet_fast", "info", **options), flush=True)
    command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device=cpu"]
    command += [
        "-k",
        installed_tests.WITHOUT_COMPILER,
        *([] if arguments.all else ["--sample=0", "--small"]),
        *arguments.files,
    ]
    sys.exit(1 if subprocess.run([*map(str, command)], **options).returncode else 0)  # pytest's own 3 is no skip


if __name__ == "__main__":
    main()
