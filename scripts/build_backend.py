"""The PEP 517 build backend: setuptools, compiling against the torch that the environment already has.

pip builds in an isolated environment. Were torch listed as a build requirement, pip would download another one into it,
gigabytes of it, and possibly for another CUDA. So torch is required only where the environment that runs pip has none
(or one before 2.11); else that environment's torch is made importable for the build.
"""

import importlib.metadata
import sys
import sysconfig
from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401  (the backend's interface)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

MINIMUM = (2, 11)


def _site_packages_with_torch() -> str | None:
    """The site-packages of the running interpreter, hidden by the isolation, if a torch to build against is there."""
    for folder in dict.fromkeys((sysconfig.get_path("platlib"), sysconfig.get_path("purelib"))):
        for found in importlib.metadata.distributions(name="torch", path=[folder]):
            if tuple(int(part) for part in found.version.split(".")[:2]) >= MINIMUM:
                return folder
    return None


def _requirements() -> list[str]:
    return [] if "torch" in sys.modules or _site_packages_with_torch() else [f"torch>={MINIMUM[0]}.{MINIMUM[1]}"]


def _make_torch_importable() -> None:
    folder = _site_packages_with_torch()
    if folder and folder not in sys.path:
        sys.path.append(folder)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Nothing but torch, where it is missing: setup.py cannot run without it, so setuptools is not asked."""
    return _requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As for a wheel."""
    return _requirements()


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Builds the wheel."""
    _make_torch_importable()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Builds the kernels in place."""
    _make_torch_importable()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
