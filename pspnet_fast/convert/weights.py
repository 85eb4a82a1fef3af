"""Weights in files, read without running what they hold."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pspnet_fast.files import wrong_archive

_CONTAINERS = ("state_dict", "model", "model_state", "network")
_FOLDER = ("model.safetensors", "pytorch_model.bin")  # as the Hub's libraries name them
_PADDLE = (
    'write the arrays without pickle where paddle is installed: python -c "import numpy, paddle; '
    "numpy.savez('weights.npz', **{k: v.numpy() for k, v in paddle.load('FILE').items()})\", and convert weights.npz"
)
_TORCH = (
    "write the weights alone where its package is installed: python -c \"import torch; torch.save(torch.load('FILE', "
    "map_location='cpu', weights_only=False)['state_dict'], 'weights.pth')\", and use weights.pth"
)


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        path: of the file.
        tensors: by name.
        rest: what stands beside them in a file of torch.save, such as ``meta``; plain data.
    """

    path: Path
    tensors: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)


def read_weights(path: Path) -> Weights:
    """Read ``.safetensors``, ``.npz`` or a file of torch.save (``weights_only=True``), or such a file in a folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, holds no weights, or needs pickle, which can run any code; the message says how to
            write it anew. Or the package safetensors is missing.
    """
    if path.is_dir():
        path = next((path / name for name in _FOLDER if (path / name).is_file()), path / _FOLDER[0])
    if not path.is_file():
        raise FileNotFoundError(f"no weights {path}")
    if path.suffix == ".safetensors":
        return Weights(path, _named(path, _read_safetensors(path)))
    if path.suffix == ".npz":
        return Weights(path, _named(path, _read_npz(path)))
    if path.suffix == ".pdparams":
        raise ValueError(f"{path}: is a pickle of Paddle, which can run any code when it is read; {_PADDLE}")
    if wrong := wrong_archive(path):
        raise ValueError(f"{path}: {wrong}; expected weights: a file of torch.save, .safetensors or .npz")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader trips over
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise ValueError(
                f"{path}: holds Python objects ({found[1]}), and reading them can run any code; {_TORCH}"
            ) from None
        raise ValueError(f"{path}: is damaged; expected weights that torch.load reads with weights_only=True") from None
    rest: dict[str, Any] = {}
    while isinstance(state, Mapping) and (inner := next((key for key in _CONTAINERS if key in state), None)):
        if not isinstance(state[inner], Mapping):
            break
        rest |= {str(name): value for name, value in state.items() if name != inner}
        state = state[inner]
    return Weights(path, _named(path, state), rest)


def _named(path: Path, state: Any) -> dict[str, Tensor]:
    tensors = isinstance(state, Mapping) and {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no weights; expected a state_dict, alone or as the entry state_dict or model")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path}: needs the package safetensors: pip install 'pspnet_fast[safetensors]'") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged or no file of safetensors ({error})") from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        first = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: is damaged or no .npz of plain arrays ({first})") from None
