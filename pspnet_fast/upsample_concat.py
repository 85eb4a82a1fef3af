"""FusedUpsampleConcat: a convolution of maps of several sizes, without their upsampling and concatenation before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .fusion.convolution import Convolution, interpolate
from .fusion.lazy import Part, Upsampling
from .head import conv_dtype, epilogue, why_not_low
from .layers import is_convolution, needs_plain
from .ops.checks import DTYPES, MAX_BINS, Mode, as_interpolation


class FusedUpsampleConcat(nn.Module):
    """Upsampling of maps to one size, bilinear or nearest, concatenation, convolution, norm and activation.

    Equivalent, in outputs, gradients and running statistics, to::

        activation(norm(conv(torch.cat([F.interpolate(z, size, mode=..., align_corners=...) for z in maps], 1))))

    as stands in the heads of UPerNet, HRNet, SegFormer and DeepLabV3+. A map smaller than `size` is convolved as it is
    and the products are interpolated (`ops.pyramid_context_` has the formula), which saves the upsampled maps and most
    of the arithmetic with them. For a model that stands already, :func:`pspnet_fast.fuse` does this in place.

    Args:
        conv: k x k, k odd (either side), stride 1, one group, zero padding (k // 2) * dilation.
        norm, activation: what follows; None for nothing. In inference, batch norm and ReLU run inside the operator.
        mode: of the upsampling, "bilinear" or "nearest".
        align_corners: of bilinear upsampling, as in F.interpolate.

    Shapes: maps (N, C_l, h_l, w_l), the C_l together conv.in_channels -> (N, O, H, W) in the dtype that F.conv2d gives.

    The layers are the module's own, as `conv`, `norm` and `activation`, and what they hold counts at every call. Where
    that is cheaper, a map keeps the plain form: upsampled if it is as large as the result, or large with few channels
    under a kernel beyond 1x1. So does all of it where `conv` has hooks or a forward of its own, for tensor subclasses,
    under torch.func and torch.jit.trace, in torch.export with dynamic sizes, and where "nearest" has a scale that
    depends on how it is rounded (no fraction by a power of two).

    Raises:
        ValueError: conv is not such a convolution; the message says why.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
        *,
        mode: Mode = "bilinear",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if reason := why_not_low(conv):
            raise ValueError(reason)
        as_interpolation(mode, align_corners)
        self.conv, self.norm, self.activation = conv, norm or nn.Identity(), activation or nn.Identity()
        self.mode, self.align_corners = mode, align_corners

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Maps (N, C_l, h_l, w_l) -> (N, O, H, W); (H, W) is `size`, by default that of the first map.

        Raises:
            ValueError: no maps, or maps whose shapes or channels do not fit.
        """
        height, width = self._check(maps, size)
        convolution = self._convolution(maps, (height, width))
        if convolution is None:
            upsampled = [
                z if z.shape[2:] == (height, width) else interpolate(z, (height, width), self._upsampling) for z in maps
            ]
            return self.activation(self.norm(self.conv(torch.cat(upsampled, 1))))
        weight, bias = self.conv.weight, self.conv.bias
        tensors = [*maps, weight] if bias is None else [*maps, weight, bias]
        folded, relu = epilogue(self.norm, self.activation, convolution.dtype, *tensors)
        if folded is not None:
            *statistics, eps = folded
            convolution, tensors = convolution.followed_by(eps), [*tensors, *statistics]
        output = convolution(*tensors, relu=relu)
        if folded is None:
            output = self.norm(output)
        return output if relu else self.activation(output)

    @property
    def _upsampling(self) -> Upsampling:
        return Upsampling(self.mode, self.align_corners if self.mode == "bilinear" else None)

    def _check(self, maps: Sequence[Tensor], size: tuple[int, int] | None) -> tuple[int, int]:
        if isinstance(maps, Tensor) or not maps:
            raise ValueError("maps must list at least one map (N, C, h, w)")
        shapes = [tuple(z.shape) for z in maps]
        if any(len(shape) != 4 or shape[0] != shapes[0][0] or min(shape[1:]) < 1 for shape in shapes):
            raise ValueError(f"maps must be (N, C, h, w) with one N, and a pixel each, but have the shapes {shapes}")
        if sum(shape[1] for shape in shapes) != self.conv.in_channels:
            raise ValueError(f"maps must have {self.conv.in_channels} channels together, but have the shapes {shapes}")
        height, width = shapes[0][2:] if size is None else size
        if min(height, width) < 1:
            raise ValueError(f"size must be (height, width) of at least 1, but is {size}")
        return height, width

    def _convolution(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Convolution | None:
        """The convolution at low resolution; None where the plain form has to run, or is cheaper."""
        conv = self.conv
        if any(needs_plain(z) for z in maps) or not is_convolution(conv) or why_not_low(conv):
            return None
        if torch.compiler.is_exporting() and any(isinstance(s, torch.SymInt) for z in maps for s in z.shape[2:]):
            return None  # the operator's graph holds the sizes of the levels
        dtype, device = conv_dtype(maps[0]), conv.weight.device
        cast = torch.is_autocast_enabled(device.type)
        if dtype not in DTYPES or any(z.device != device or max(z.shape[2:]) > MAX_BINS for z in maps):
            return None
        if any(z.dtype != (maps[0] if cast else conv.weight).dtype for z in maps):
            return None
        if not all(self._upsampling.exact(z.shape[2:], size) for z in maps):
            return None
        parts = [(Part(z.size(1), upsampling=None if z.shape[2:] == size else self._upsampling), (z,)) for z in maps]
        dilation: tuple[int, int] = conv.dilation  # type: ignore[assignment]
        return Convolution.of(parts, tuple(conv.weight.shape), size, dilation, dtype)
