"""Checkpoints: written whole or not at all, read as plain data (``weights_only=True``). See docs/checkpoints.md."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pspnet_fast.files import replacing, wrong_archive

FORMAT = 3
READABLE = (
    1,
    2,
    3,
)  # 1 knows no place within an epoch; 2 holds random states, for which step stands now
KEYS = ("model", "class_names", "metadata", "config", "step", "steps", "history")
EXPECTED = "expected a checkpoint that `pspnet-fast train` or pspnet_fast.training.fit saved"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain data) to ``path``; a failure leaves the file before it untouched.

    Raises:
        OSError: it cannot be written; the message names the file, and the bytes needed and free.
    """
    with replacing(path, _bytes(state)) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds more than plain data, or was not written by :func:`fit`; the message says
            what it is.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; {EXPECTED}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    if wrong := wrong_archive(path):
        raise ValueError(f"{path}: {wrong}; {EXPECTED}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader trips over; what it says is of no use to whoever has the file
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds Python objects ({found[1]})" if found else "cannot be read as tensors and plain data"
        raise ValueError(f"{path}: is damaged or no checkpoint: {what}; {EXPECTED}") from None
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: is no checkpoint of pspnet_fast: it holds {_contents(state)}; {EXPECTED}")
    if state["format"] not in READABLE:
        known = f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}"
        raise ValueError(f"{path}: is a checkpoint of format {state['format']}; this version reads {known}")
    if missing := [key for key in KEYS if key not in state]:
        raise ValueError(f"{path}: is no whole checkpoint: it lacks {', '.join(missing)}; {EXPECTED}")
    return state


def _contents(state: Any) -> str:
    """What a file of another program holds, for a message."""
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    tensors = sum(isinstance(value, Tensor) for value in state.values())
    keys = ", ".join(repr(key) for key in list(state)[:4]) + (", ..." if len(state) > 4 else "")
    what = f"a state_dict of {tensors} tensors" if state and tensors == len(state) else "a mapping"
    return f"{what} with the keys {keys}" if state else "an empty mapping"


def _bytes(value: Any) -> int:
    """Bytes of all tensors in nested plain data; what else a checkpoint holds is small beside them."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
