"""Checkpoints: written whole or not at all, read as plain data (``weights_only=True``)."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain data) to ``path``; an interruption leaves the file before it untouched."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds more than plain data, or was not written by :func:`save_checkpoint`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: is damaged or no checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: is no checkpoint of pspnet_fast (format {FORMAT})")
    return state
