"""The PEP 517 build backend: setuptools, compiling against the torch that the environment already has.

pip, uv and build make an isolated environment to build in. Were torch a build requirement, a second one would be
downloaded into it: gigabytes, and possibly for another CUDA. So the isolated build borrows the packages of an
environment that it hides, and asks for torch only where there is none that is new enough.

pip runs the environment's own Python and hides its packages. uv, build and poetry run a Python made for the build and
do not tell for which environment: it is taken for the active one, .venv here, or that of the first Python on PATH that
has torch. Without isolation nothing has to be guessed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import setuptools
from setuptools.build_meta import (  # noqa: F401  (the backend's interface)
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

MINIMUM = (2, 11)
_ASK = "import json, sys; print(json.dumps([list(sys.version_info[:2]), sys.path[1:]]))"


def _interpreters() -> Iterator[str]:
    """Pythons of the environment that this build is for, the likeliest first."""
    if not os.path.realpath(setuptools.__file__).startswith(os.path.realpath(sys.prefix) + os.sep):
        yield sys.executable  # pip's isolation: setuptools comes from elsewhere, by PYTHONPATH
        return
    prefixes = [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), ".venv"]
    yield from (str(Path(prefix, "bin", "python")) for prefix in prefixes if prefix)
    yield from (str(Path(folder, name)) for folder in os.get_exec_path() for name in ("python3", "python"))


def _path_of(interpreter: str) -> list[str]:
    """Its sys.path without the build isolation, if it is of this version of Python."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")}
    try:
        answer = subprocess.run([interpreter, "-c", _ASK], env=environment, capture_output=True, check=True).stdout
        version, path = json.loads(answer)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return []
    return path if tuple(version) == sys.version_info[:2] else []


def _has_torch(path: list[str]) -> bool:
    found = next(iter(distributions(name="torch", path=path)), None)
    return found is not None and tuple(int(part) for part in found.version.split(".")[:2]) >= MINIMUM


def _borrow() -> None:
    """Put the packages of an environment that has torch last on the path: the isolated setuptools go before its own.

    Not where this environment has it itself (no isolation), nor one whose torch is too old, which would be found before
    the one that is asked for here.
    """
    tried = set()
    for interpreter in _interpreters():
        if interpreter in tried or not os.access(interpreter, os.X_OK):
            continue
        tried.add(interpreter)
        if _has_torch(path := _path_of(interpreter)):
            sys.path += [folder for folder in path if folder not in sys.path]
            print(f"pspnet_fast: builds against the torch of {interpreter}", file=sys.stderr)
            return


if not _has_torch(sys.path):
    _borrow()


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Only torch, where it is missing: setup.py cannot run without it, so setuptools is not asked."""
    return [] if _has_torch(sys.path) else [f"torch>={MINIMUM[0]}.{MINIMUM[1]}"]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
