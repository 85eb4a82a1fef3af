"""FusedPSPHead: pyramid pooling and the convolution after it, without the concatenation between them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .layers import has_statistics, is_convolution, is_identity, is_relu, needs_plain, runs_only
from .modules import FusedPPM
from .ops._library import needs_grad
from .ops.checks import DTYPES, Norm, flatten, scale_of
from .ops.pyramid_context import PyramidContextFunction
from .split_weight import Channels, level_products, split_product, why_not_split

_context: Any = torch.ops.pspnet_fast.pyramid_context_.default
FEW_CELLS = 128  # for which products by pyramid_reduce take no longer than a matrix product a level
LEAST_ELEMENTS = 1 << 14  # of upsampled maps, for whose convolution more operations pay (concatenation_is_cheaper)


class FusedPSPHead(nn.Module):
    """Pyramid pooling, reduction and bottleneck convolution of a PSPNet or UPerNet head, with norm and activation.

    Equivalent, in outputs, gradients and running statistics, to `bottleneck(ppm(x))` with
    `bottleneck = nn.Sequential(conv, norm, activation)`, with the state_dict keys of these two, whose modules it holds
    and shares. It computes neither the concatenation nor the upsampled maps: the convolution of a level's few cells is
    interpolated instead (`ops.pyramid_context_`), which saves the arithmetic of half the convolution's channels.

    Args:
        ppm: the pyramid, with any norm, activation, order of concatenation and align_corners.
        conv: k x k, k odd (either side), stride 1, one group, zero padding (k // 2) * dilation, of ppm.out_channels.
        norm, activation: what follows; None for nothing. In evaluation, batch norm and ReLU run inside the operator.

    Shapes: x (N, C, H, W) -> (N, O, H, W) in the dtype that F.conv2d gives: that of x, under autocast autocast's. The
    pyramid runs in the dtype of x, the levels' products with the weight in that of the result.

    Every call computes with what the parameters hold then: no copy of a weight is kept from one call to the next. The
    plain form bottleneck(ppm(x)) runs where ppm, bottleneck or conv have hooks or parametrizations or were exchanged
    for modules with a forward of their own (LoRA), for tensor subclasses, torch.jit.trace and torch.fx, and where the
    levels have so many cells, or the map so few pixels, that it is cheaper (concatenation_is_cheaper).

    Raises:
        ValueError: conv is not such a convolution; the message says why.
    """

    def __init__(
        self, ppm: FusedPPM, conv: nn.Conv2d, norm: nn.Module | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        if reason := why_no_bottleneck(ppm, conv):
            raise ValueError(reason)
        self.ppm = ppm
        self.bottleneck = nn.Sequential(conv, norm or nn.Identity(), activation or nn.Identity())

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        return psp_head(input, self.ppm, self.bottleneck)


def why_no_bottleneck(ppm: FusedPPM, conv: nn.Module) -> str:
    """Why psp_head cannot take a convolution, or an empty string."""
    if isinstance(conv, nn.Conv2d) and conv.in_channels != ppm.out_channels:
        return f"conv must have the ppm's {ppm.out_channels} channels as input, but has {conv.in_channels}"
    return why_not_low(conv)


def why_not_low(conv: nn.Module) -> str:
    """Why a layer cannot convolve maps before their upsampling, or an empty string."""
    if not isinstance(conv, nn.Conv2d):
        return f"conv must be an nn.Conv2d, but is a {type(conv).__name__}"
    padding = conv.padding if conv.padding_mode == "zeros" else ()
    reason = why_not_split(conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)
    return reason and f"conv {reason}, but is {conv}"


def psp_head(input: Tensor, ppm: nn.Module, bottleneck: nn.Module) -> Tensor:
    """bottleneck(ppm(input)), by FusedPSPHead's algorithm where it can be: (N, C, H, W) -> (N, O, H, W).

    It can where ppm is a FusedPPM, and the bottleneck a sequence that begins with convolution, norm and activation.
    """
    layers = list(bottleneck) if runs_only(bottleneck, nn.Sequential.forward) else []  # type: ignore[call-overload]
    if len(layers) < 3 or not _is_fused(input, ppm, layers[0]):
        return bottleneck(ppm(input))
    conv, norm, activation, *rest = layers
    output = _fused(input, ppm, conv, norm, activation)  # type: ignore[arg-type]
    for layer in rest:
        output = layer(output)
    return output


def _fused(input: Tensor, ppm: FusedPPM, conv: nn.Conv2d, norm: nn.Module, activation: nn.Module) -> Tensor:
    ppm._check(input)
    if pyramid := ppm._pyramid(input):
        reduced, input = pyramid.reduced(input)
    else:
        reduced = ppm._reduce(ops.pyramid_pool(input, ppm.bins))
    dtype = conv_dtype(input)
    folded, relu = epilogue(norm, activation, dtype, input, reduced, conv.weight, conv.bias)
    weight, bias, rest = conv.weight, conv.bias, folded
    if folded is not None and ops.portable.exporting():
        (weight, bias), rest = into_convolution(folded, weight, bias), None
    dense, taps = _products(weight, ppm, reduced, dtype)
    padding: Any = conv.padding
    output = F.conv2d(input, dense, bias, padding=padding, dilation=conv.dilation)  # type: ignore[arg-type]
    kh, kw = conv.kernel_size
    settings: dict[str, Any] = {"dilation": conv.dilation, "align_corners": ppm.align_corners}
    if torch.compiler.is_compiling():
        output = ops.pyramid_context_(output, taps, ppm.bins, (kh, kw), norm=rest, relu=relu, **settings)
    else:  # the operator without the checks of its wrapper, which these tensors pass
        *statistics, eps = rest or (0.0,)
        window = flatten(ppm.levels), [kh, kw], list(conv.dilation), int(ppm.align_corners), True
        if needs_grad(output, taps):
            output = PyramidContextFunction.apply(output, taps, statistics, eps, *window)
        else:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                _context(output, taps, statistics, eps, relu, *window)
    if folded is None:
        output = norm(output)
    return output if relu else activation(output)


def _products(weight: Tensor, ppm: FusedPPM, reduced: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The map's part of the weight, and the levels' products with theirs, in the dtype of the convolution.

    The part too where autocast would convert it, in the pass that copies it.
    """
    reduced = reduced if reduced.dtype == dtype else reduced.to(dtype)
    narrows = weight.dtype == torch.float32 and _autocasts(weight.device.type)
    few = sum(_cells(ppm)) <= FEW_CELLS and not torch.compiler.is_compiling()
    if few and dtype in DTYPES and (weight.dtype == dtype or narrows):
        bins, first = flatten(ppm.levels), ppm.concat == "input_first"
        return level_products(weight, ppm.in_channels, first, reduced, bins, dtype)
    dense, parts = _channels(ppm)
    return split_product(weight, [dense], parts, reduced.split(_cells(ppm), 1))


def _is_fused(input: Tensor, ppm: nn.Module, conv: nn.Module) -> bool:
    """Whether the plain form would compute the same, at a higher price: whatever became of the modules since."""
    return (
        isinstance(ppm, FusedPPM)
        and runs_only(ppm, FusedPPM.forward)
        and not needs_plain(input)  # asked before the weight is read, which torch.fx would record
        and is_convolution(conv)
        and not why_no_bottleneck(ppm, conv)
        # a compiled or exported graph is meant for other sizes as well
        and (torch.compiler.is_compiling() or not concatenation_is_cheaper(ppm, *input.shape[2:]))
    )


def concatenation_is_cheaper(ppm: FusedPPM, height: int, width: int) -> bool:
    """Whether convolving the concatenation costs less than the levels' products with the weight.

    Measured on a CPU, 3x3, 4 levels: where the levels have more cells than the map has pixels, whatever the channels
    (bins (1, 2, 3, 6): below 7x7, (4, 8, 12, 16): below 20x20), and where the upsampled maps have so few elements that
    the number of operations decides: twice as many as of a convolution alone, for the levels' products have to pay too.
    """
    pixels = height * width
    return sum(_cells(ppm)) > pixels or len(ppm.levels) * ppm.reduction_channels * pixels < 2 * LEAST_ELEMENTS


def _cells(ppm: FusedPPM) -> list[int]:
    return [h * w for h, w in ppm.levels]


def _channels(ppm: FusedPPM) -> tuple[Channels, list[Channels]]:
    """The input channels of the map, and those of each level."""
    c, r = ppm.in_channels, ppm.reduction_channels
    first_input, first_level = (0, c) if ppm.concat == "input_first" else (ppm.out_channels - c, 0)
    return (first_input, c), [(first_level + level * r, r) for level in range(len(ppm.levels))]


def conv_dtype(input: Tensor) -> torch.dtype:
    """The dtype of F.conv2d's result."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if _autocasts(device) and input.dtype != torch.float64 else input.dtype


def _autocasts(device: str) -> bool:
    # torch 2.11 cannot compile the question, which only a device like "meta" answers by no
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def into_convolution(norm: Norm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the norm that follows in them: what an export computes once, for all."""
    *statistics, eps = norm
    scale = scale_of(statistics, eps)
    shift = statistics[1] - statistics[2] * scale if bias is None else statistics[1] + (bias - statistics[2]) * scale
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def epilogue(
    norm: nn.Module, activation: nn.Module, dtype: torch.dtype, *tensors: Tensor | None
) -> tuple[Norm | None, bool]:
    """What of norm and activation ops.pyramid_context_ may do, whose result depends on these tensors: the norm as it
    takes it, or None, and whether the ReLU. Nothing where a gradient is needed.
    """
    folded = _folded(norm, dtype)
    if needs_grad(*tensors, *(folded or ())[:4]):
        return None, False
    return folded, (folded is not None or is_identity(norm)) and is_relu(activation)


def _folded(norm: nn.Module, dtype: torch.dtype) -> Norm | None:
    """A batch norm in evaluation mode, an affine map by its buffers, as ops.pyramid_context_ takes it."""
    if not has_statistics(norm):
        return None
    tensors: Any = norm.weight, norm.bias, norm.running_mean, norm.running_var
    if any(t.dtype not in (torch.float32, dtype) or t.dtype != tensors[0].dtype for t in tensors):
        return None
    return (*tensors, norm.eps)
