"""FusedPSPHead of frozen weights: split, folded and packed once."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..fusion.lazy import Lazy
from ..head import FEW_CELLS, FusedPSPHead, _cells, _channels, _is_fused, psp_head, why_no_bottleneck
from ..layers import has_statistics, is_convolution, is_identity, is_relu, runs_only
from ..models import PSPNet
from ..modules import FusedPPM
from ..ops._library import needs_grad
from ..ops.checks import flatten
from ..split_weight import taps_of
from .packed import Geometry, PackedConvolution, affine

_split: Any = torch.ops.pspnet_fast.pyramid_split_weight.default


class FrozenPSPHead(nn.Module):
    """What :class:`pspnet_fast.FusedPSPHead` computes, with weights that stay as they are.

    Under autocast, with gradients, for tensor subclasses, in a compiled graph and for other dtypes it is that.

    Args:
        ppm, bottleneck: as FusedPSPHead has them, in evaluation mode; why_not_frozen says which.
        dtype: to compute in; the parameters may be rounded to it afterwards.
    """

    def __init__(self, ppm: FusedPPM, bottleneck: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        self.ppm, self.bottleneck = ppm, bottleneck
        layers: list[Any] = list(bottleneck)
        conv, norm, activation = layers
        self._dtype = dtype
        self._norm_folded = has_statistics(norm)
        self._relu = (self._norm_folded or is_identity(norm)) and is_relu(activation)
        self._bins, self._kernel = flatten(ppm.levels), conv.kernel_size
        weight, bias = conv.weight, conv.bias
        if self._norm_folded:
            scale, shift = affine((norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps), bias)
            weight = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
            bias = shift.to(weight.dtype)
        dense, _ = _channels(ppm)
        padding: Any = tuple(k // 2 * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        geometry = Geometry((1, 1), padding, conv.dilation, 1)
        self._dense = PackedConvolution(weight.narrow(1, *dense).clone(), bias, None, geometry, dtype)
        self._matrices = _split(weight, ppm.in_channels, ppm.concat == "input_first", len(ppm.levels), dtype)[1]

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        if isinstance(input, Lazy):
            input = input.value()
        ppm, layers = self.ppm, list(self.bottleneck)
        weight: Any = layers[0].weight
        conv, norm, activation = layers
        if not self._takes(input) or not _is_fused(input, ppm, conv):
            return psp_head(input, ppm, self.bottleneck)
        with torch._C.DisableTorchFunction():
            ppm._check(input)
            pyramid = ppm._pyramid(input)
            reduced = pyramid.reduced(input)[0] if pyramid else ppm._reduce(ops.pyramid_pool(input, ppm.bins))
            taps = taps_of(reduced, self._matrices, self._bins, weight)
            settings: dict[str, Any] = {"dilation": conv.dilation, "align_corners": ppm.align_corners}
            output = self._dense(input)
            output = ops.pyramid_context_(output, taps, ppm.bins, self._kernel, relu=self._relu, **settings)
        if not self._norm_folded:
            output = norm(output)
        return output if self._relu else activation(output)

    def _takes(self, input: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(input, Tensor):
            return False
        if torch.is_autocast_enabled(input.device.type) or needs_grad(input):
            return False
        return input.dtype == self._dtype and input.device == self._matrices.device


def why_not_frozen(ppm: nn.Module, bottleneck: list[nn.Module]) -> str:
    """Why a pyramid, and the convolution, norm and activation after it, cannot be frozen; empty if they can."""
    if not (isinstance(ppm, FusedPPM) and runs_only(ppm, FusedPPM.forward)):
        return "the pyramid is no FusedPPM"
    if len(bottleneck) < 3 or not is_convolution(bottleneck[0]):
        return "no convolution, norm and activation follow"
    if sum(_cells(ppm)) > FEW_CELLS:
        return f"more than {FEW_CELLS} cells"
    if any(not runs_only(layer, type(layer).forward) for layer in bottleneck[:3]):
        return "layers have hooks"
    return why_no_bottleneck(ppm, bottleneck[0])


def freeze_heads(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Puts frozen heads in place of those of PSPNet and FusedPSPHead, in place; returns the model."""
    for module in list(model.modules()):
        if isinstance(module, PSPNet) and module.head == "fused" and type(module)._classify is PSPNet._classify:
            layers = list(module.cls) if runs_only(module.cls, nn.Sequential.forward) else []
            if layers and not why_not_frozen(module.ppm, layers):
                module.ppm = FrozenPSPHead(module.ppm, nn.Sequential(*layers[:3]), dtype)  # type: ignore[arg-type]
                module.cls = nn.Sequential(*layers[3:])
        for name, child in module.named_children():
            setattr(module, name, _frozen(child, dtype))
    return _frozen(model, dtype)


def _frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if not isinstance(module, FusedPSPHead) or not runs_only(module, FusedPSPHead.forward):
        return module
    if not runs_only(module.bottleneck, nn.Sequential.forward) or why_not_frozen(module.ppm, list(module.bottleneck)):
        return module
    return FrozenPSPHead(module.ppm, module.bottleneck, dtype)
