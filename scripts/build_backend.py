"""The PEP 517 build backend: setuptools, compiling against the torch that the environment already has.

pip builds in an isolated environment. Were torch a build requirement, pip would download a second one into it:
gigabytes, and possibly for another CUDA. So the isolated build borrows the packages of the environment that it hides,
and asks for torch only where that environment has none that is new enough.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from setuptools.build_meta import (  # noqa: F401  (the backend's interface)
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

MINIMUM = (2, 11)


def _hidden_path() -> list[str]:
    """sys.path of this interpreter without the build isolation, which works through PYTHONPATH and PYTHONNOUSERSITE."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def _has_torch() -> bool:
    try:
        return tuple(int(part) for part in version("torch").split(".")[:2]) >= MINIMUM
    except PackageNotFoundError:
        return False


# Last on the path: the isolated setuptools and ninja go before the environment's. Not in the environment itself (no
# isolation) or where its torch is too old: that one must not be found before the one that is asked for here.
if not _has_torch():
    _own_path = sys.path.copy()
    sys.path += [folder for folder in _hidden_path() if folder not in sys.path]
    if not _has_torch():
        sys.path[:] = _own_path


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Only torch, where it is missing: setup.py cannot run without it, so setuptools is not asked."""
    return [] if _has_torch() else [f"torch>={MINIMUM[0]}.{MINIMUM[1]}"]


get_requires_for_build_editable = get_requires_for_build_sdist = get_requires_for_build_wheel
