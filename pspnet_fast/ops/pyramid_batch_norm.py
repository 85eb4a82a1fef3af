"""pyramid_batch_norm: batch normalisation and ReLU of all levels, as in training, in one launch each way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import plain
from ._library import register_derivatives, run_plain, transforms_active
from .checks import (
    BatchNorm,
    Bins,
    as_levels,
    check_flag,
    check_number,
    check_shape,
    check_tensor,
    count_cells,
    flatten,
    unflatten,
)

_forward = torch.ops.pspnet_fast.pyramid_batch_norm.default
_backward = torch.ops.pspnet_fast.pyramid_batch_norm_backward.default


def pyramid_batch_norm(
    reduced: Tensor,
    bins: Bins,
    norm: Sequence[BatchNorm],
    *,
    training: Sequence[bool],
    momentum: Sequence[float],
    relu: bool = False,
) -> Tensor:
    """Batch normalisation of every level's cells, then ReLU where `relu`: the gradient's counterpart of a folded norm.

    Equivalent, level by level, to `F.batch_norm(reduced[:, cells].transpose(1, 2), running_mean, running_var, weight,
    bias, training, momentum, eps)`, running statistics included, then ReLU.

    Args:
        reduced: (N, P, R), as pyramid_reduce returns it.
        bins: as given to pyramid_pool.
        norm: for each level (weight, bias, running_mean, running_var, eps), tensors (R,) in float32 or the dtype of
            reduced, the same for all. weight and bias, or running_mean and running_var, may be None, in all levels.
        training: for each level whether it is normalised by the statistics of the batch, of which its running ones,
            if any, take their share in place; else it is by its running statistics.
        momentum: for each level that share.
        relu: whether to clamp the result at 0.

    Returns:
        (N, P, R) in the dtype of reduced. The same bits on every run, forward and backward. Derivatives of any order by
        reduced, weights and biases, forward-mode and torch.func: docs/derivatives.md.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; a level in training with one value
            a channel, or one in evaluation without running statistics.
        RuntimeError: running statistics share memory with each other or with reduced, or are not contiguous.
    """
    levels = as_levels(bins)
    check_tensor("reduced", reduced, "(N, P, R)")
    n, _, r = reduced.shape
    check_shape("reduced", reduced, (n, count_cells(levels), r), "(N, cells of bins, R)")
    if r < 1:
        raise ValueError("reduced must have R >= 1, but has shape " + str(tuple(reduced.shape)))
    for name, values in (("norm", norm), ("training", training), ("momentum", momentum)):
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise TypeError(f"{name} must hold one entry a level, but is {values!r}")
        if len(values) != len(levels):
            raise ValueError(
                f"{name} must hold one entry a level, {len(levels)} for bins {bins!r}, but holds {len(values)}"
            )
    lists = _lists(norm, reduced)
    eps = [check_number("eps of norm", level[4]) for level in norm]
    shares = [check_number("momentum", share) for share in momentum]
    for flag, level in zip(training, levels, strict=True):
        check_flag("training", flag)
        if flag and n * count_cells((level,)) == 1:
            raise ValueError(f"training: a level of bins {level} has one value a channel at N = 1: no statistics")
        if not flag and not lists[2]:
            raise ValueError("training must be True in every level, since norm has no running statistics")
    check_flag("relu", relu)
    arguments = reduced, *lists, [int(flag) for flag in training], shares, eps, relu, flatten(levels)
    output, _ = run_plain(plain.pyramid_batch_norm, *arguments) if transforms_active() else _forward(*arguments)
    return output


def _lists(norm: Sequence[BatchNorm], reduced: Tensor) -> list[list[Tensor]]:
    """weights, biases, running_means, running_vars, each one a level or none."""
    if not all(isinstance(level, Sequence) and len(level) == 5 for level in norm):
        raise TypeError(
            f"norm must hold (weight, bias, running_mean, running_var, eps) for each level, but is {norm!r}"
        )
    lists: list[list[Tensor]] = []
    for name, tensors in zip(("weight", "bias", "running_mean", "running_var"), zip(*norm, strict=True), strict=False):
        given: list[Any] = [t for t in tensors if t is not None]
        if given and len(given) != len(norm):
            raise ValueError(f"{name} of norm must be given for all levels or for none, but is given for {len(given)}")
        for tensor in given:
            check_tensor(f"{name} of norm", tensor, "(R)")
            check_shape(f"{name} of norm", tensor, (reduced.size(2),), "(R,)")
        lists.append(given)
    if len(lists[0]) != len(lists[1]) or len(lists[2]) != len(lists[3]):
        raise ValueError("norm must have weight and bias, running_mean and running_var both or neither")
    everything = [t for tensors in lists for t in tensors]
    for tensor in everything:
        if tensor.dtype != everything[0].dtype or tensor.dtype not in (torch.float32, reduced.dtype):
            raise TypeError(f"norm must be float32 or {reduced.dtype} throughout, but holds {tensor.dtype}")
        if tensor.device != reduced.device:
            raise ValueError(
                f"norm must be on the device of reduced, {reduced.device}, but holds a tensor on {tensor.device}"
            )
    return lists


class PyramidBatchNormFunction(torch.autograd.Function):
    """Gradient of pyramid_batch_norm."""

    @staticmethod
    def forward(
        ctx: Any, running: Any, batch: list[int], momentum: list[float], eps: Any, relu: bool, bins: Any, *tensors: Any
    ) -> Any:
        reduced, *affine = tensors
        levels = len(affine) // 2
        weights, biases = affine[:levels], affine[levels:]
        with torch._C._AutoDispatchBelowAutograd():
            output, statistics = _forward(reduced, weights, biases, *running, batch, momentum, eps, relu, bins)
        ctx.settings = batch, eps, bins
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(reduced, output if relu else None, statistics, *weights)
        return output, statistics

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> Any:
        reduced, output, statistics, *weights = ctx.saved_tensors
        if grad_output is None:
            return (None,) * (7 + 2 * len(weights))
        grad_reduced, grad_affine = _backward(grad_output, reduced, output, weights, statistics, *ctx.settings)
        # reshape, not flatten: is_grads_batched=True knows that
        affine = grad_affine.reshape(-1, grad_affine.size(2)).unbind() if weights else ()
        return None, None, None, None, None, None, grad_reduced, *affine


def _recorded(
    reduced: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    *rest: Any,
) -> Any:
    return PyramidBatchNormFunction.apply((means, variances), *rest, reduced, *weights, *biases)


def _written(*args: Any) -> list[Tensor]:
    """The running statistics of levels in training; inference tensors have no version, so nobody has kept them."""
    means, variances, batch = args[3:6]
    running = [t for tensors in (means, variances) for t, flag in zip(tensors, batch, strict=False) if flag]
    return [t for t in running if not t.is_inference()]


register_derivatives("pyramid_batch_norm", plain.pyramid_batch_norm, _recorded, mutated=_written)
register_derivatives("pyramid_batch_norm_backward", plain.pyramid_batch_norm_backward)


@torch.library.register_fake("pspnet_fast::pyramid_batch_norm")
def _(reduced: Tensor, weights: Any, biases: Any, means: Any, variances: Any, batch: list[int], *_: Any) -> Any:
    dtype = torch.float64 if reduced.dtype == torch.float64 else torch.float32
    return reduced.new_empty(reduced.shape), reduced.new_empty((2, len(batch), reduced.size(2)), dtype=dtype)


@torch.library.register_fake("pspnet_fast::pyramid_batch_norm_backward")
def _(
    grad_output: Tensor,
    reduced: Tensor,
    output: Tensor | None,
    weights: list[Tensor],
    statistics: Tensor,
    batch: list[int],
    eps: list[float],
    bins: list[int],
) -> tuple[Tensor, Tensor]:
    like = weights[0] if weights else reduced
    return reduced.new_empty(reduced.shape), like.new_empty(2, len(unflatten(bins)), reduced.size(2))
