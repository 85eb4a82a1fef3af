"""pyramid_context_: the upsampled levels' part of a convolution, added to that of the map without upsampling them."""

from typing import Any

import torch
from torch import Tensor

from . import plain, portable
from ._library import needs_grad, register_derivatives, run_plain, transforms_active
from .checks import (
    Bins,
    Mode,
    Norm,
    as_interpolation,
    as_levels,
    as_norm,
    as_window,
    check_flag,
    check_map,
    check_shape,
    check_tensor,
    count_cells,
    flatten,
    no_norm,
    scale_of,
    unflatten,
)

_forward = torch.ops.pspnet_fast.pyramid_context_.default
_backward = torch.ops.pspnet_fast.pyramid_context_backward.default


def pyramid_context_(
    conv: Tensor,
    taps: Tensor,
    bins: Bins,
    kernel_size: int | tuple[int, int],
    *,
    dilation: int | tuple[int, int] = 1,
    mode: Mode = "bilinear",
    align_corners: bool = True,
    norm: Norm | None = None,
    relu: bool = False,
    accumulate: bool = True,
) -> Tensor:
    """Adds to a convolution of x what it gives for upsampled maps, the levels, in place, in one read and write.

    A k x k convolution of [x, U_1 ... U_L] is the sum of one of x and one of each upsampled level U_l = upsample(z_l).
    A level has fewer cells than U_l has pixels, so each is multiplied with the weights of every tap first, and the
    products are interpolated. Levels may be as few as a pyramid's or as many as a feature pyramid's maps have:

        taps[n, cell (i, j) of l, u * kw + v, o] = sum over c of weight_l[o, c, u, v] * z_l[n, c, i, j]
        conv[n, o] += sum over l, u, v of upsample(taps[n, cells of l, u * kw + v, o]), shifted by tap (u, v)

    with zeros shifted in: the padding (k // 2) * dilation of a convolution that keeps the size of its input. Then batch
    normalisation with running statistics where `norm` is given and ReLU where `relu`; these serve inference only.

    Args:
        conv: (N, O, H, W), the convolution of x (its bias included), contiguous or channels-last, float32, float64,
            bfloat16 or float16.
        taps: (N, P, kh * kw, O) in the dtype of conv; P the cells of all levels, as pyramid_pool numbers them.
        bins: as given to pyramid_pool.
        kernel_size: odd, one int or (kh, kw); at most 4096 together with the sum of the bins, multiplied.
        dilation: of the convolution, one int or (height, width), from 1 to 65536.
        mode: of the upsampling, "bilinear" or "nearest"; the latter finds a pixel's cell in float32, as F.interpolate
            does for all but float64.
        align_corners: of bilinear upsampling, as in F.interpolate.
        norm: (weight, bias, running_mean, running_var, eps), tensors (O,) in float32 or the dtype of conv.
        relu: whether to clamp the result at 0.
        accumulate: whether to add to what conv holds; else conv is only written, and has no gradient.

    Returns:
        conv. Sums are taken in float32 (float64 for float64). The same bits on every run, forward and backward. Its
        gradient is handed on as it is; backward reads it once for the gradient of taps. Derivatives of
        any order, forward-mode and torch.func: docs/derivatives.md.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; norm or relu where a gradient is
            needed.
        RuntimeError: elements of conv share memory with each other, as expanded ones do, or with taps or norm; conv is
            an inference tensor outside inference mode; out of memory.
    """
    levels = as_levels(bins)
    size, step = as_window(kernel_size, dilation, levels)
    check_map("conv", conv)
    check_tensor("taps", taps, "(N, P, kh * kw, O)", conv)
    n, o, _, _ = conv.shape
    check_shape("taps", taps, (n, count_cells(levels), size[0] * size[1], o), "(N, cells of bins, kh * kw, O)")
    tensors, eps = as_norm(norm)
    for t in tensors:
        check_shape("norm", t, (o,), "(O,)")
        if t.dtype != tensors[0].dtype or t.dtype not in (torch.float32, conv.dtype):
            raise TypeError(f"norm must be float32 or {conv.dtype} throughout, but holds {t.dtype}")
        if t.device != conv.device:
            raise ValueError(f"norm must be on the device of conv, {conv.device}, but holds a tensor on {t.device}")
    if (norm is not None or relu) and needs_grad(conv, taps, *tensors):
        raise ValueError(
            "norm and relu are for inference: leave them out where a gradient is needed, or use torch.no_grad()"
        )
    interpolation = as_interpolation(mode, align_corners)
    check_flag("accumulate", accumulate)
    check_flag("relu", relu)
    mode_of_export = portable.exporting()  # within a lazy map's computation no mode sees the operator
    if not tensors and torch.compiler.is_exporting() and mode_of_export is None:
        tensors, eps = no_norm(conv, o), 0.0
    arguments = conv, taps, tensors, eps, relu, flatten(levels), list(size), list(step), interpolation, accumulate
    if transforms_active():
        run_plain(plain.pyramid_context_, *arguments)
    elif mode_of_export is not None:
        mode_of_export.call(_forward, *arguments)
    else:
        _forward(*arguments)
    return conv


class PyramidContextFunction(torch.autograd.Function):
    """Gradient of pyramid_context_ without ReLU, by conv and taps alone."""

    @staticmethod
    def forward(ctx: Any, conv: Tensor, taps: Tensor, norm: list[Tensor], eps: float, *settings: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            _forward(conv, taps, norm, eps, False, *settings)
        ctx.mark_dirty(conv)
        *ctx.settings, ctx.accumulate = settings
        ctx.norm, ctx.eps = norm, eps
        return conv

    @staticmethod
    def backward(ctx: Any, grad_conv: Tensor) -> Any:
        if ctx.norm:
            grad_conv = grad_conv * scale_of(ctx.norm, ctx.eps).to(grad_conv.dtype)[:, None, None]
        grad_taps = _backward(grad_conv, *ctx.settings) if ctx.needs_input_grad[1] else None
        return grad_conv if ctx.accumulate else None, grad_taps, None, None, *(None for _ in ctx.settings), None


def _recorded(conv: Tensor, taps: Tensor, norm: list[Tensor], eps: float, relu: bool, *settings: Any) -> None:
    if relu or needs_grad(*norm):
        raise RuntimeError("pyramid_context_ has no gradient with relu or by norm: they are for inference")
    PyramidContextFunction.apply(conv, taps, norm, eps, *settings)


register_derivatives("pyramid_context_", plain.pyramid_context_, _recorded, mutated=0)
register_derivatives("pyramid_context_backward", plain.pyramid_context_backward)


@torch.library.register_fake("pspnet_fast::pyramid_context_")
def _(
    conv: Tensor,
    taps: Tensor,
    norm: list[Tensor],
    eps: float,
    relu: bool,
    bins: list[int],
    kernel_size: list[int],
    dilation: list[int],
    interpolation: int,
    accumulate: bool,
) -> None:
    return None


@torch.library.register_fake("pspnet_fast::pyramid_context_backward")
def _(grad_conv: Tensor, bins: list[int], kernel_size: list[int], dilation: list[int], interpolation: int) -> Tensor:
    n, o, _, _ = grad_conv.shape
    return grad_conv.new_empty(n, count_cells(unflatten(bins)), kernel_size[0] * kernel_size[1], o)
