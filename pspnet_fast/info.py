"""What is installed: versions, for what the kernels were compiled, what this machine has (`pspnet-fast info`)."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import ops  # noqa: F401  (loads the kernels)


def collect() -> dict[str, Any]:
    """The facts as plain data: keys versions, built, machine."""
    built = json.loads(torch.ops.pspnet_fast.build_info())
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "versions": {
            "pspnet_fast": _version("pspnet_fast"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "built": built,
        "machine": {
            "processor": platform.machine(),
            "cpu_kernels": torch.ops.pspnet_fast.cpu_instruction_set(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
            "cuda_kernels": bool(gpus) and built["cuda"] is not None,
        },
    }


def format(facts: dict[str, Any]) -> str:
    """The facts for a reader, a line each."""
    versions, built, machine = facts["versions"], facts["built"], facts["machine"]
    cuda = f"CUDA {built['cuda']} for {built['cuda_architectures']}" if built["cuda"] else "not built"
    return "\n".join(
        [
            f"pspnet_fast   {versions['pspnet_fast']}, torch {versions['torch']}, Python {versions['python']}",
            f"built         against torch {built['torch']} for torch >= 2.11 (stable ABI), g++ {built['compiler']}",
            f"CPU kernels   built for {', '.join(built['cpu'])}; running {machine['cpu_kernels']}, "
            f"{machine['threads']} threads",
            f"CUDA kernels  {cuda}",
            f"GPUs          {', '.join(machine['gpus']) or 'none visible'}",
        ]
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown (not installed)"
