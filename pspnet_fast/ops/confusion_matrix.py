"""confusion_matrix: counts of pixels by target and prediction, where they lie."""

import torch
from torch import Tensor

from . import plain
from ._library import register_batching, register_inplace, transforms_active
from .checks import check_dense, check_integer, check_shape

_count = torch.ops.pspnet_fast.confusion_matrix_.default
_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def confusion_matrix(
    prediction: Tensor, target: Tensor, K: int, ignore_index: int = 255, out: Tensor | None = None
) -> Tensor:
    """Counts pixels by (target, prediction); those whose target is ignore_index do not count.

    Equivalent to `torch.bincount(target * K + prediction, minlength=K * K).view(K, K)` over the other pixels, but
    without a synchronisation of device and host.

    Args:
        prediction: classes in [0, K), uint8, int16, int32 or int64, of any shape.
        target: classes in [0, K) or ignore_index, of the same shape, in any of these dtypes.
        K: number of classes.
        ignore_index: the target that does not count; it may lie in [0, K).
        out: (K, K) int64, contiguous: takes the counts in addition, in place. It shares no memory with the others.

    Returns:
        out, or a new (K, K) int64 on the device of target: row = target, column = prediction. Exact, so the same on
        every run.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        IndexError: on a CPU, a value out of range, which the message names; nothing has been counted then. On CUDA,
            which is not waited for, such pixels do not count.
        RuntimeError: out shares memory with prediction or target, or is an inference tensor outside inference mode.
    """
    for name, tensor in (("prediction", prediction), ("target", target)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a Tensor of uint8, int16, int32 or int64, but is {kind}")
        check_dense(name, tensor)
    check_shape("prediction", prediction, target.shape, "that of target")
    if prediction.device != target.device:
        raise ValueError(f"prediction must be on the device of target, {target.device}, but is on {prediction.device}")
    if not isinstance(K, int) or K < 1:
        raise ValueError(f"K must be an int >= 1, but is {K!r}")
    check_integer("ignore_index", ignore_index)
    if out is None:
        out = torch.zeros(K, K, dtype=torch.int64, device=target.device)
        if transforms_active():  # a batch of counts for a batch of either
            out = out + sum(t.new_zeros(K, K, dtype=torch.int64) for t in (prediction, target))
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a Tensor of int64, but is a {type(out).__name__}")
    if out.dtype != torch.int64 or not out.is_contiguous():
        raise TypeError(f"out must be contiguous and int64, but is {out.dtype} with strides {out.stride()}")
    check_shape("out", out, (K, K), "(K, K)")
    if out.device != target.device:
        raise ValueError(f"out must be on the device of target, {target.device}, but is on {out.device}")
    _count(out, prediction, target, ignore_index)
    return out


register_batching("confusion_matrix_", plain.confusion_matrix_)  # there is nothing to differentiate
register_inplace("confusion_matrix_", mutated=0)


@torch.library.register_fake("pspnet_fast::confusion_matrix_")
def _(counts: Tensor, prediction: Tensor, target: Tensor, ignore_index: int) -> None:
    return None
