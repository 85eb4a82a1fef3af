"""Argument checks of the operators: every message names the argument, what was given and what is allowed."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Bins = Sequence[int | tuple[int, int]]
Norm = tuple[Tensor, Tensor, Tensor, Tensor, float]  # weight, bias, running_mean, running_var, eps
Mode = Literal["bilinear", "nearest"]
NEAREST = 2  # as the operators number it; bilinear: whether corners are aligned
Reduction = Literal["none", "mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "sum")  # by their numbers in csrc/kernels.h

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_LEVELS, MAX_BINS, MAX_CELLS = 16, 4096, 1 << 24  # csrc/pyramid_math.h, csrc/tensors.h
MAX_SEEN, MAX_DILATION = 4096, 1 << 16  # csrc/pyramid_context.cpp


def as_levels(bins: Bins) -> tuple[tuple[int, int], ...]:
    """(bins_h, bins_w) of every level.

    Args:
        bins: for each level an int (square) or a pair (bins_h, bins_w).

    Raises:
        TypeError: bins is no sequence of ints or pairs of ints.
        ValueError: no level, more than 16, a bin count outside 1 to 4096, or more than 2^24 cells.
    """
    if isinstance(bins, (str, bytes)) or not isinstance(bins, Sequence):
        raise TypeError(f"bins must be a sequence of ints or pairs of ints, such as (1, 2, 3, 6), but is {bins!r}")
    if not 1 <= len(bins) <= MAX_LEVELS:
        raise ValueError(f"bins must have 1 to {MAX_LEVELS} levels, but {bins!r} has {len(bins)}")
    levels = []
    for level in bins:
        pair = (level, level) if isinstance(level, int) else tuple(level) if isinstance(level, Sequence) else None
        if pair is None or len(pair) != 2 or not all(isinstance(b, int) and not isinstance(b, bool) for b in pair):
            raise TypeError(f"bins must hold ints or pairs of ints, but {bins!r} holds {level!r}")
        if not all(1 <= b <= MAX_BINS for b in pair):
            raise ValueError(f"bins must be from 1 to {MAX_BINS}, but {bins!r} holds {level!r}")
        levels.append(pair)
    if sum(h * w for h, w in levels) > MAX_CELLS:
        raise ValueError(f"bins must make at most {MAX_CELLS} cells together, but are {bins!r}")
    return tuple(levels)


def as_window(
    kernel_size: int | tuple[int, int], dilation: int | tuple[int, int], levels: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """kernel_size and dilation of a convolution that keeps the size of its input, each as (height, width).

    Raises:
        TypeError: one is neither an int nor a pair of ints.
        ValueError: an even kernel size, one that makes more than 4096 with the sum of the bins, or a dilation outside
            1 to 65536.
    """
    pairs = []
    for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
        pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
        if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair):
            raise TypeError(f"{name} must be an int or a pair of ints, but is {value!r}")
        pairs.append(pair)
    size, step = pairs
    if not all(k >= 1 and k % 2 == 1 for k in size):
        raise ValueError(f"kernel_size must be odd and at least 1, but is {kernel_size!r}")
    if any(k * sum(level[axis] for level in levels) > MAX_SEEN for axis, k in enumerate(size)):
        raise ValueError(
            f"kernel_size times the sum of the bins must be at most {MAX_SEEN}, but they are {kernel_size!r}, {levels}"
        )
    if not all(1 <= d <= MAX_DILATION for d in step):
        raise ValueError(f"dilation must be from 1 to {MAX_DILATION}, but is {dilation!r}")
    return size, step


def flatten(levels: tuple[tuple[int, int], ...]) -> list[int]:
    """bins as the compiled operators take them."""
    return [b for level in levels for b in level]


def unflatten(bins: list[int]) -> tuple[tuple[int, int], ...]:
    """The inverse of flatten."""
    return tuple(zip(bins[::2], bins[1::2], strict=True))


def count_cells(levels: tuple[tuple[int, int], ...]) -> int:
    """P, the cells of all levels together: 50 for (1, 2, 3, 6)."""
    return sum(h * w for h, w in levels)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a map is meant as channels-last: its channels lie densely and it is not contiguous."""
    return tensor.stride(1) == 1 and tensor.size(1) > 1 and not tensor.is_contiguous()


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The memory format that outputs take over from a map."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def check_tensor(name: str, tensor: Tensor, shape: str, like: Tensor | None = None) -> None:
    """Checks type, rank and dtype of an argument, and that it agrees with the tensor `like` in dtype and device.

    Args:
        shape: what the argument must be, such as "(N, C, H, W)"; its commas give the rank.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor of shape {shape}, but is a {type(tensor).__name__}")
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, but has {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, but is {_name(tensor.dtype)}")
    check_dense(name, tensor)
    if like is None:
        return
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the dtype of the first argument, {_name(like.dtype)}, but is {_name(tensor.dtype)}"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of the first argument, {like.device}, but is on {tensor.device}"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    """Checks that a tensor has strides: that it is no sparse one."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, but its layout is {tensor.layout}")


def check_number(name: str, value: float) -> float:
    """A real number as a float."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{name} must be a number, but is {value!r}") from None


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r}")


def as_interpolation(mode: str, align_corners: bool) -> int:
    """The number of F.interpolate's mode and align_corners, as csrc/pyramid_math.h has them."""
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode must be 'bilinear' or 'nearest', but is {mode!r}")
    check_flag("align_corners", align_corners)
    return NEAREST if mode == "nearest" else int(align_corners)


def as_norm(norm: Norm | None) -> tuple[list[Tensor], float]:
    """The tensors of a norm, whose shapes are not checked, and its eps; none where there is no norm."""
    if norm is None:
        return [], 0.0
    if not isinstance(norm, Sequence) or len(norm) != 5:
        raise TypeError(f"norm must be (weight, bias, running_mean, running_var, eps), but is {norm!r}")
    for tensor in norm[:4]:
        check_tensor("norm", tensor, "(channels)")
    return list(norm[:4]), check_number("eps of norm", norm[4])


def no_norm(like: Tensor, channels: int) -> list[Tensor]:
    """The tensors of a norm that does nothing, for eps 0.

    For exported programs: AOTInductor's runner takes an empty list of tensors for None (torch 2.13).
    """
    one, zero = like.new_ones(channels), like.new_zeros(channels)
    return [one, zero, zero, one]


def scale_of(norm: Sequence[Tensor], eps: float) -> Tensor:
    """What a norm by running statistics multiplies with."""
    return norm[0] * (norm[3] + eps).rsqrt()


def check_integer(name: str, value: int) -> None:
    """Checks an int of 64 bits."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, but is {value!r}")
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{name} must be an int of 64 bits, but is {value!r}")


def check_map(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Checks a feature map (N, C, H, W) with at least one channel and one pixel."""
    check_tensor(name, tensor, "(N, C, H, W)", like)
    if tensor.size(1) < 1 or tensor.size(2) < 1 or tensor.size(3) < 1:
        raise ValueError(f"{name} must have C >= 1, H >= 1 and W >= 1, but has shape {tuple(tensor.shape)}")


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """(height, width) of a map to make, each at least 1."""
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"size must be a pair (height, width), but is {size!r}")
    height, width = size
    if not all(isinstance(s, int) and not isinstance(s, bool) for s in size):
        raise TypeError(f"size must hold ints, but is {size!r}")
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1 x 1, but is {tuple(size)}")
    if height >= 1 << 31 or width >= 1 << 31:
        raise ValueError(f"size must be below 2^31 each way, but is {tuple(size)}")
    return height, width


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Checks the exact shape of an argument; `meaning` says what it is made of."""
    if len(tensor.shape) != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True)):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}, but has {tuple(tensor.shape)}")


def check_channels(name: str, concat: Tensor, offset: int, channels: int) -> None:
    """Checks that the channels [offset, offset + channels) exist in a concatenation."""
    if not isinstance(offset, int) or offset < 0 or offset + channels > concat.size(1):
        raise ValueError(
            f"offset must leave room for {channels} channels in {name}, which has {concat.size(1)}: "
            f"from 0 to {concat.size(1) - channels}, but is {offset!r}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
