"""upsample_softmax_accumulate_: adds up the probabilities of several predictions of one image."""

from typing import Any

import torch
from torch import Tensor

from . import plain
from ._library import needs_grad, register_derivatives, run_plain, transforms_active
from .checks import check_flag, check_integer, check_map, check_number, check_shape, check_size

_forward = torch.ops.pspnet_fast.upsample_softmax_accumulate_.default


def upsample_softmax_accumulate_(
    probabilities: Tensor,
    logits: Tensor,
    *,
    align_corners: bool,
    top: int = 0,
    left: int = 0,
    size: tuple[int, int] | None = None,
    mirrored: bool = False,
    weight: float = 1.0,
) -> Tensor:
    """Adds the softmax of upsampled logits to a window of a map, in place: for scales, crops and mirrored images.

    Equivalent to, in float32 at least, with (h, w) = size, `p = F.interpolate(logits, size, mode="bilinear",
    align_corners=align_corners).softmax(1)` and `probabilities[:, :, top : top + h, left : left + w] += weight * p`,
    where `mirrored` with `p.flip(3)` in place of p.

    Args:
        probabilities: (N, K, H, W), float32, float64 where logits are; any strides, each element a place of
            its own.
        logits: (N, K, h, w), float32, float64, bfloat16 or float16, of any strides. N >= 0, K, h, w >= 1.
        align_corners: as in F.interpolate.
        top, left: the first row and column of the window.
        size: (height, width) of the window, to which logits are upsampled; by default the rest of the map.
        mirrored: logits are of the image mirrored horizontally: mirror them back.
        weight: of this prediction.

    Returns:
        probabilities. A pixel with NaN or +inf among its logits, or -inf alone, becomes NaN; a class of -inf adds 0,
        also where its weight is 0, which F.interpolate makes NaN. Probabilities below 1.2e-38 (float64: 1e-307) of the
        greatest count as 0. The same bits on every run. No gradient; forward-mode and vmap: docs/derivatives.md.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or where a gradient is needed.
        RuntimeError: elements of the window share memory with each other, as expanded ones do, or with logits;
            probabilities are an inference tensor outside inference mode; out of memory.
    """
    check_map("logits", logits)
    check_map("probabilities", probabilities)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if probabilities.dtype != wide:
        raise TypeError(f"probabilities must be {wide} for logits of {logits.dtype}, but is {probabilities.dtype}")
    if probabilities.device != logits.device:
        raise ValueError(
            f"probabilities must be on the device of logits, {logits.device}, but is on {probabilities.device}"
        )
    n, k, h, w = probabilities.shape
    check_shape("logits", logits, (n, k, *logits.shape[2:]), "(N and K of probabilities, h, w)")
    check_integer("top", top)
    check_integer("left", left)
    if top < 0 or left < 0:
        raise ValueError(f"top and left must be at least 0, but are {top} and {left}")
    height, width = check_size((h - top, w - left) if size is None else size)
    if top + height > h or left + width > w:
        raise ValueError(
            f"the window must lie in probabilities ({h} x {w}), but has top {top}, left {left} and size "
            f"{(height, width)}"
        )
    check_flag("align_corners", align_corners)
    check_flag("mirrored", mirrored)
    number = check_number("weight", weight)
    if needs_grad(probabilities, logits):
        raise ValueError("upsample_softmax_accumulate_ has no gradient: use torch.no_grad()")
    arguments = probabilities, logits, top, left, height, width, align_corners, mirrored, number
    if transforms_active():
        run_plain(plain.upsample_softmax_accumulate_, *arguments)
    else:
        _forward(*arguments)
    return probabilities


def _recorded(*_: Any) -> None:
    raise RuntimeError("upsample_softmax_accumulate_ has no gradient: use torch.no_grad()")


register_derivatives("upsample_softmax_accumulate_", plain.upsample_softmax_accumulate_, _recorded, mutated=0)


@torch.library.register_fake("pspnet_fast::upsample_softmax_accumulate_")
def _(
    probabilities: Tensor,
    logits: Tensor,
    top: int,
    left: int,
    height: int,
    width: int,
    align_corners: bool,
    mirrored: bool,
    weight: float,
) -> None:
    return None
