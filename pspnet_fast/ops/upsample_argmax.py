"""upsample_argmax: the predicted class of every pixel, straight from low-resolution logits."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import plain
from ._library import needs_grad, register_derivatives
from .checks import check_flag, check_map, check_size

_forward = torch.ops.pspnet_fast.upsample_argmax.default
_MOST_BYTE_CLASSES = 256  # csrc/upsample_argmax.cpp


@overload
def upsample_argmax(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool, return_confidence: Literal[False] = False
) -> Tensor: ...
@overload
def upsample_argmax(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool, return_confidence: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def upsample_argmax(
    logits: Tensor, size: tuple[int, int], *, align_corners: bool, return_confidence: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The class of the greatest logit at every pixel of the upsampled map, which itself never exists.

    Equivalent to `F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)`, in float32 at least, then
    `.argmax(1)` and, with `return_confidence`, `.softmax(1).amax(1)`.

    Args:
        logits: (N, K, h, w), float32, float64, bfloat16 or float16, of any strides. N >= 0, K, h, w >= 1.
        size: (H, W) of the result, larger or smaller than (h, w).
        align_corners: as in F.interpolate.
        return_confidence: whether to return the class's probability as well.

    Returns:
        classes (N, H, W), uint8 where K <= 256, else int32; with `return_confidence` (classes, confidence), confidence
        (N, H, W) float32, float64 for float64 logits. Among equal logits the lowest class wins. As in torch.argmax, NaN
        counts as the greatest; the confidence is NaN there, and where a logit is +inf or all are -inf. As in
        F.interpolate, +inf and NaN make NaN where their weight is 0; other than there, -inf does not count there, so
        that a class switched off never wins. Arithmetic is float32, float64 for float64; the same bits on every run. No
        gradient; forward-mode derivatives of the confidence and vmap: docs/derivatives.md.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype; return_confidence where a gradient is
            needed.
    """
    check_map("logits", logits)
    height, width = check_size(size)
    check_flag("align_corners", align_corners)
    check_flag("return_confidence", return_confidence)
    if return_confidence and needs_grad(logits):
        raise ValueError("return_confidence has no gradient: detach logits, or use torch.no_grad()")
    classes, confidence = _forward(logits, height, width, align_corners, return_confidence)
    return (classes, confidence) if return_confidence else classes


def _recorded(
    logits: Tensor, height: int, width: int, align_corners: bool, return_confidence: bool
) -> tuple[Tensor, Tensor]:
    if return_confidence:
        raise RuntimeError("upsample_argmax has no gradient of the confidence: detach logits, or use torch.no_grad()")
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(logits, height, width, align_corners, return_confidence)


register_derivatives("upsample_argmax", plain.upsample_argmax, _recorded)


@torch.library.register_fake("pspnet_fast::upsample_argmax")
def _(logits: Tensor, height: int, width: int, align_corners: bool, return_confidence: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.size(0), height, width)
    classes = logits.new_empty(shape, dtype=torch.uint8 if logits.size(1) <= _MOST_BYTE_CLASSES else torch.int32)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return classes, logits.new_empty(shape if return_confidence else (0,), dtype=wide)
