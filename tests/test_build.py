"""What the build decides and says before it compiles, and that its product needs no certain Python."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

import pspnet_fast

ROOT = Path(__file__).parents[1]
SWITCHES = ("USE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "DEBUG", "PYTHONPATH", "CC", "CXX")
FAKE_CPP_EXTENSION = """
import os
from setuptools.command.build_ext import build_ext as BuildExtension
CUDA_HOME = os.environ.get("CUDA_HOME")
def CppExtension(name, sources, **options):
    from setuptools import Extension
    print("sources", *sources)
    print("defines", *options["extra_compile_args"]["cxx"])
    return Extension(name, sources)
CUDAExtension = CppExtension
def include_paths(device): return [os.path.join(CUDA_HOME, "include")]
"""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")


def run(command: list[object], cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run([*map(str, command)], env=clean | environment, capture_output=True, text=True, cwd=cwd)


class Machine:
    """A machine of the test's choosing: setup.py up to the compiler, with another torch and CUDA toolkit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install_torch(self, version: str, cuda: str | None, gpu: bool = False) -> None:
        (self.folder / "torch" / "utils").mkdir(parents=True)
        (self.folder / "torch" / "__init__.py").write_text(
            f"__version__ = {version!r}\nclass version: cuda = {cuda!r}\nclass cuda: is_available = lambda: {gpu}\n"
        )
        (self.folder / "torch" / "utils" / "__init__.py").touch()
        (self.folder / "torch" / "utils" / "cpp_extension.py").write_text(FAKE_CPP_EXTENSION)

    def install_nvcc(self, release: str, says: str = "") -> str:
        """With something to say it compiles nothing."""
        for name in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
            (self.folder / "toolkit" / "include").mkdir(parents=True, exist_ok=True)
            (self.folder / "toolkit" / "include" / name).touch()
        fails = f'[ "$1" = --version ] || {{ echo "{says}" >&2; exit 1; }}' if says else ""
        script = f"{fails}\necho 'Cuda compilation tools, release {release}, V{release}.88'"
        return str(self.install("toolkit/bin/nvcc", script).parents[1])

    def install(self, path: str, script: str) -> Path:
        program = self.folder / path
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return program

    def build(self, **switches: str) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, "setup.py", "--version"], PYTHONPATH=str(self.folder), **switches)

    def refuses(self, **switches: str) -> str:
        """The one line with which the build stops."""
        result = self.build(**switches)
        assert result.returncode == 1, result.stdout + result.stderr
        assert len(result.stderr.splitlines()) == 1
        return result.stderr.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_no_torch(machine: Machine) -> None:
    (machine.folder / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    assert machine.refuses() == (
        "pspnet_fast needs torch >= 2.11 to build (No module named 'torch'): pip install 'torch>=2.11'"
    )


def test_old_torch(machine: Machine) -> None:
    machine.install_torch("2.10.1+cu128", "12.8")
    assert "needs torch >= 2.11 to build, but found 2.10.1+cu128" in machine.refuses()


@pytest.mark.parametrize(("name", "allowed"), [("USE_CUDA", "auto, 0, 1"), ("DEBUG", "0, 1")])
def test_unknown_value_of_a_switch(machine: Machine, name: str, allowed: str) -> None:
    machine.install_torch("2.13.0+cpu", None)
    assert machine.refuses(**{name: "bogus"}) == f"{name} must be one of {allowed}, but is 'bogus'"


def test_no_compiler(machine: Machine) -> None:
    machine.install_torch("2.13.0+cpu", None)
    message = machine.refuses(CXX="no-such-c++")
    assert message.startswith("pspnet_fast needs g++ >= 11 to build, but 'no-such-c++' will not do: it cannot be run (")
    assert "apt-get install g++" in message
    assert "CXX" in message


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo \"c++: error: unrecognized option '-std=c++20'\" >&2; exit 1",
            "error: unrecognized option '-std=c++20'",
        ),
        (
            "echo 'In file included from'; echo 'probe.cpp:6: error: no __builtin_shuffle' >&2; exit 1",
            "__builtin_shuffle",
        ),
        ("exit 4", "it ends with status 4"),
    ],
)
def test_a_compiler_that_does_not_compile(machine: Machine, script: str, reason: str) -> None:
    """Too old, not g++, or broken."""
    machine.install_torch("2.13.0+cpu", None)
    message = machine.refuses(CXX=str(machine.install("bin/c++", script)))
    assert "pspnet_fast needs g++ >= 11 to build" in message
    assert reason in message


def test_a_compiler_that_nvcc_refuses(machine: Machine) -> None:
    machine.install_torch("2.14.1+cu130", "13.0")
    toolkit = machine.install_nvcc("13.0", says="host_config.h: fatal error: unsupported GNU version")
    message = machine.refuses(CUDA_HOME=toolkit)
    assert message.startswith(
        f"{toolkit}/bin/nvcc does not work with this C++ compiler: host_config.h: fatal error: uns"
    )
    assert "USE_CUDA=0" in message
    assert "CUDA kernels off" in machine.build(CUDA_HOME=toolkit, USE_CUDA="0").stdout


def test_torch_without_cuda(machine: Machine) -> None:
    machine.install_torch("2.13.0+cpu", None)
    assert machine.refuses(USE_CUDA="1").startswith("USE_CUDA=1, but torch 2.13.0+cpu is a build without CUDA")
    output = machine.build().stdout
    assert "USE_CUDA=auto: CUDA kernels off (torch 2.13.0+cpu is a build without CUDA)" in output
    assert ".cu" not in output


def test_no_nvcc(machine: Machine) -> None:
    machine.install_torch("2.14.1+cu130", "13.0")
    assert machine.refuses(USE_CUDA="1").startswith("USE_CUDA=1, but no nvcc was found on PATH or in CUDA_HOME")
    assert machine.refuses(USE_CUDA="1", CUDA_HOME=str(machine.folder)).startswith("USE_CUDA=1, but no nvcc was found")
    assert "CUDA kernels off (no nvcc was found" in machine.build().stdout


def test_nvcc_of_another_cuda(machine: Machine) -> None:
    machine.install_torch("2.14.1+cu130", "13.0")
    toolkit = machine.install_nvcc("12.4")
    assert f"{toolkit}/bin/nvcc is of CUDA 12.4, but torch 2.14.1+cu130 of CUDA 13.0" in machine.refuses(
        USE_CUDA="1", CUDA_HOME=toolkit
    )
    assert "CUDA kernels off" in machine.build(CUDA_HOME=toolkit).stdout


def test_nvcc_without_its_toolkit(machine: Machine) -> None:
    """A link or wrapper on PATH, or the package of nvcc alone."""
    machine.install_torch("2.14.1+cu130", "13.0")
    toolkit = machine.install_nvcc("13.0")
    os.remove(f"{toolkit}/include/cuda_runtime.h")
    reason = f"the toolkit of {toolkit}/bin/nvcc lacks headers ("
    message = machine.refuses(USE_CUDA="1", CUDA_HOME=toolkit)
    assert message.startswith(f"USE_CUDA=1, but {reason}")
    assert "cuda_runtime.h: No such file" in message
    output = machine.build(CUDA_HOME=toolkit).stdout
    assert f"CUDA kernels off ({reason}" in output
    assert ".cu " not in output
    machine.install("toolkit/bin/nvcc", "exit 127")
    assert f"CUDA kernels off ({toolkit}/bin/nvcc cannot be run)" in machine.build(CUDA_HOME=toolkit).stdout


def test_cuda(machine: Machine) -> None:
    machine.install_torch("2.14.1+cu130", "13.0")
    toolkit = machine.install_nvcc("13.1")  # CUDA is compatible within a major version
    output = machine.build(CUDA_HOME=toolkit).stdout
    assert "USE_CUDA=auto: CUDA kernels on" in output
    assert "TORCH_CUDA_ARCH_LIST=8.0;8.6;8.9;9.0;10.0;12.0+PTX" in output
    assert "csrc/cuda/pyramid_pool.cu" in output
    output = machine.build(CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST="9.0;10.0", MAX_JOBS="3").stdout
    assert "TORCH_CUDA_ARCH_LIST=9.0;10.0" in output
    assert "-DPSPNET_FAST_CUDA_ARCHITECTURES=9.0 10.0" in output
    assert "MAX_JOBS=3, DEBUG=0" in output
    output = machine.build(CUDA_HOME=toolkit, USE_CUDA="0").stdout
    assert "USE_CUDA=0: CUDA kernels off" in output
    assert ".cu" not in output


def test_a_visible_gpu_decides_the_architecture(machine: Machine) -> None:
    machine.install_torch("2.14.1+cu130", "13.0", gpu=True)
    assert "TORCH_CUDA_ARCH_LIST=of the visible GPUs" in machine.build(CUDA_HOME=machine.install_nvcc("13.0")).stdout


def test_real_torch() -> None:
    output = run([sys.executable, "setup.py", "--version"]).stdout
    assert f"pspnet_fast: torch {torch.__version__} at {Path(torch.__file__).parent}" in output
    assert output.splitlines()[-1] == pspnet_fast.__version__


def test_the_licence_is_no_matter_of_setuptools_version(machine: Machine) -> None:
    """pyproject.toml can hold it in a form for setuptools before 77 or after, not for both."""
    machine.install_torch("2.13.0+cpu", None)
    asked = run([sys.executable, "setup.py", "--license"], PYTHONPATH=str(machine.folder))
    assert asked.stdout.splitlines()[-1] == "BSD-3-Clause"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if line.startswith("license")]
    assert 'dynamic = ["license"]' in text


def test_a_source_folder_that_hides_the_installed_package_says_so(tmp_path: Path) -> None:
    installed, checkout = Path(pspnet_fast.__file__).parent, tmp_path / "check out"
    shutil.copytree(installed, checkout / "pspnet_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = f"import os; os.chdir({str(checkout)!r}); import pspnet_fast"  # as `python` would, started there
    error = run([sys.executable, "-c", code], PYTHONPATH=str(installed.parent)).stderr.splitlines()[-1]
    assert error == (
        f"ImportError: {checkout} is a source folder without compiled kernels, and it hides the installed {installed}: "
        "start Python in another folder, or build the kernels here with `pip install -e .`"
    )


@pytest.mark.parametrize(("version", "warned"), [("2.99.0+cu140", True), ("2.11.0", False)])
def test_a_torch_newer_than_those_tested_is_warned_of_once(version: str, warned: bool) -> None:
    code = (
        f"import torch; torch.__version__ = {version!r}\n"
        "import warnings; warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    from pspnet_fast import ops; import pspnet_fast\n"
        "print([str(w.message) for w in caught if 'pspnet_fast' in str(w.message)])"
    )
    result = run([sys.executable, "-c", code], PYTHONPATH=str(Path(pspnet_fast.__file__).parents[1]))
    assert result.returncode == 0, result.stderr
    messages = eval(result.stdout)
    assert len(messages) == warned
    assert not warned or messages[0].startswith("pspnet_fast was tested with torch 2.11 to ")


def environment(folder: Path, torch_version: str | None) -> tuple[Path, Path]:
    """A virtual environment with a torch of that version: its Python and the folder of its packages."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip())
    if torch_version:
        (packages / f"torch-{torch_version}.dist-info").mkdir()
        metadata = f"Name: torch\nVersion: {torch_version}\n"
        (packages / f"torch-{torch_version}.dist-info" / "METADATA").write_text(metadata)
        (packages / "torch.py").touch()
    return python, packages


def link_setuptools(folder: Path) -> None:
    for name in ("setuptools", "_distutils_hack"):
        (folder / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)


@pytest.mark.parametrize(
    ("installed", "required"),
    [(None, "torch>=2.11"), ("2.10.1", "torch>=2.11"), ("2.11.0", None), ("2.13.0+cpu", None), ("3.0.0.dev1", None)],
)
def test_isolated_build_borrows_torch(tmp_path: Path, installed: str | None, required: str | None) -> None:
    """pip's isolation: the backend's own packages come through PYTHONPATH, those of the environment are hidden."""
    python, packages = environment(tmp_path / "env", installed)
    overlay = tmp_path / "overlay"  # holds setuptools, and nothing else of this interpreter's packages
    overlay.mkdir()
    link_setuptools(overlay)
    command = (
        f"import sys; sys.path.remove({str(packages)!r}); import build_backend as backend\n"
        "for of in ('wheel', 'editable', 'sdist'): print(getattr(backend, f'get_requires_for_build_{of}')())\n"
        "import torch; print(torch.__file__)"
    )
    result = run([python, "-c", command], PYTHONPATH=f"{overlay}{os.pathsep}{ROOT / 'scripts'}")
    assert result.returncode == (1 if required else 0), result.stderr
    *requirements, torch_file = result.stdout.splitlines() + [""] * bool(required)
    assert requirements == [str([required] if required else [])] * 3, result.stderr
    assert torch_file == ("" if required else str(packages / "torch.py"))


def test_build_environments_of_uv_and_build_borrow_torch(tmp_path: Path) -> None:
    """Their Python is made for the build; the environment is the active one, .venv here, or one on PATH."""
    build, packages = environment(tmp_path / "build", None)
    for name in ("setuptools", "_distutils_hack"):  # a link would lie elsewhere
        shutil.copytree(Path(sysconfig.get_path("purelib")) / name, packages / name)
    here = tmp_path / "here"
    torch_of = {name: environment(tmp_path / name, "2.13.0")[1] for name in ("active", "on_path", "here/.venv")}
    environment(tmp_path / "old", "2.10.1")
    command = (
        "import build_backend as backend; required = backend.get_requires_for_build_wheel(); print(required)\n"
        "if not required: import torch; print(torch.__file__)"
    )

    def borrowed(folder: Path = here, active: str = "", *path: str) -> str:
        folders = [str(build.parent), *(str(tmp_path / name / "bin") for name in path)]
        variables = {"VIRTUAL_ENV": str(tmp_path / active) if active else "", "CONDA_PREFIX": ""}
        result = run(
            [build, "-c", command], folder, PYTHONPATH=str(ROOT / "scripts"), PATH=":".join(folders), **variables
        )
        return result.stdout.splitlines()[-1] if result.returncode == 0 else result.stderr

    assert borrowed(tmp_path) == borrowed(tmp_path, "old") == borrowed(tmp_path, "", "old") == "['torch>=2.11']"
    assert borrowed(here, "active", "on_path") == str(torch_of["active"] / "torch.py")
    assert borrowed(here, "old", "on_path") == str(torch_of["here/.venv"] / "torch.py")
    assert borrowed(tmp_path, "build", "old", "on_path") == str(torch_of["on_path"] / "torch.py")


def test_library_needs_no_python() -> None:
    """So that one library serves every Python >= 3.10."""
    library = Path(pspnet_fast.__file__).parent / "_C.abi3.so"
    symbols = run(["nm", "-D", "--undefined-only", library])
    names = [line.split()[1] for line in symbols.stdout.splitlines()]
    assert any(name.startswith("aoti_torch") for name in names), symbols.stderr  # torch's stable interface
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    assert not [name for name in names if "N2at" in name or "N3c10" in name]  # torch's unstable C++ one
