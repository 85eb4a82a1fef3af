"""FusedPSPHead: pyramid pooling and the convolution after it, without the concatenation between them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from . import ops
from .modules import FusedPPM
from .ops.checks import check_map
from .ops.pyramid_reduce import Norm

Parts = tuple[Tensor, list[Tensor]]  # of a weight: for the map; for each level (kh * kw * O, R)


class SplitWeight:
    """The parts of a convolution's weight, copied once for many calls in evaluation.

    They are copied anew when the weight is another tensor or has been written to, as far as torch counts that: writing
    through `.data` it does not count. A copy or a pickle of this object is empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Tensor, Parts] | None = None

    def __reduce__(self) -> Any:
        return SplitWeight, ()

    def drop(self) -> None:
        """Frees the copies."""
        self._kept = None

    def __call__(self, ppm: FusedPPM, conv: nn.Conv2d, dtype: torch.dtype) -> Parts:
        """The parts in a dtype."""
        weight = conv.weight
        if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter) or weight.is_inference():
            return _split_copies(ppm, weight, dtype)
        # what is kept of the weight holds its memory, so no other can lie at that address
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.device, dtype, ppm.concat)
        kept = self._kept
        if kept is None or kept[0] != key:
            kept = key, weight.detach(), _split_copies(ppm, weight, dtype)
            self._kept = kept
        return kept[2]


class KeepsSplitWeight(nn.Module):
    """A module with a SplitWeight, which is dropped by train(), eval() and whatever moves or casts the module."""

    def __init__(self) -> None:
        super().__init__()
        self._split = SplitWeight()

    def train(self, mode: bool = True) -> Any:
        """As that of nn.Module."""
        self._split.drop()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._split.drop()
        return super()._apply(*args, **kwargs)


class FusedPSPHead(KeepsSplitWeight):
    """Pyramid pooling, reduction and bottleneck convolution of a PSPNet or UPerNet head, with norm and activation.

    Equivalent, in outputs, gradients and running statistics, to `bottleneck(ppm(x))` with
    `bottleneck = nn.Sequential(conv, norm, activation)`, with the state_dict keys of these two, whose modules it holds
    and shares. It computes neither the concatenation nor the upsampled maps: the convolution of a level's few cells is
    interpolated instead (ops.pyramid_context_), which saves the arithmetic of half the convolution's channels.

    Args:
        ppm: the pyramid, with any norm, activation, order of concatenation and align_corners.
        conv: k x k, k odd (either side), stride 1, one group, zero padding (k // 2) * dilation, of ppm.out_channels.
        norm, activation: what follows; None for nothing. In evaluation, batch norm and ReLU run inside the operator.

    Shapes: x (N, C, H, W) -> (N, O, H, W) in the dtype that F.conv2d gives: that of x, under autocast autocast's. The
    pyramid runs in the dtype of x, the levels' products with the weight in that of the result.

    In evaluation without gradients the weight's parts are copied once and kept (as much memory as the weight), until
    the weight changes or train(), eval() or to() is called; call one of these after writing to weight.data. Under
    torch.compile nothing is kept. Hooks of conv do not run. Where the levels have so many cells, or the map so few
    pixels, that the concatenation is cheaper (concatenation_is_cheaper), the plain form runs.

    Raises:
        ValueError: conv is not such a convolution; the message says why.
    """

    def __init__(
        self, ppm: FusedPPM, conv: nn.Conv2d, norm: nn.Module | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_bottleneck(ppm, conv)
        self.ppm = ppm
        self.bottleneck = nn.Sequential(conv, norm or nn.Identity(), activation or nn.Identity())

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        conv, norm, activation = self.bottleneck
        return psp_head(input, self.ppm, conv, norm, activation, self._split)  # type: ignore[arg-type]


def check_bottleneck(ppm: FusedPPM, conv: nn.Conv2d) -> None:
    """Raises a ValueError unless psp_head takes this convolution."""
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"conv must be an nn.Conv2d, but is a {type(conv).__name__}")
    if conv.in_channels != ppm.out_channels:
        raise ValueError(f"conv must have the ppm's {ppm.out_channels} channels as input, but has {conv.in_channels}")
    size, dilation = conv.kernel_size, conv.dilation
    same = tuple(k // 2 * d for k, d in zip(size, dilation, strict=True))
    if any(k % 2 == 0 for k in size) or conv.stride != (1, 1) or conv.groups != 1:
        raise ValueError(f"conv must have an odd kernel size, stride 1 and one group, but is {conv}")
    if conv.padding not in (same, "same") or conv.padding_mode != "zeros":
        raise ValueError(f"conv must be padded by {same} zeros, which keeps the size, but is {conv}")


def psp_head(
    input: Tensor, ppm: FusedPPM, conv: nn.Conv2d, norm: nn.Module, activation: nn.Module, split: SplitWeight
) -> Tensor:
    """activation(norm(conv(ppm(input)))), by FusedPSPHead's algorithm: (N, C, H, W) -> (N, O, H, W)."""
    check_map("input", input)
    if input.size(1) != ppm.in_channels:
        raise ValueError(
            f"input must have in_channels = {ppm.in_channels} channels, but has shape {tuple(input.shape)}"
        )
    # a compiled or exported graph is meant for other sizes as well
    if not torch.compiler.is_compiling() and concatenation_is_cheaper(ppm, input.size(2), input.size(3)):
        return activation(norm(conv(ppm(input))))
    reduced = ppm._reduce(ops.pyramid_pool(input, ppm.bins))
    dtype = _conv_dtype(input)
    tensors = [input, reduced, conv.weight, conv.bias, *norm.parameters()]
    inference = not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
    if inference:
        weight, levels = split(ppm, conv, dtype)
        taps = _multiply(reduced.to(dtype), levels, ppm, conv.out_channels)
    elif torch.compiler.is_compiling():  # the compiler plans by itself what to keep
        weight, context = _split(ppm, conv.weight)
        taps = _multiply(reduced.to(dtype), _level_weights(context, len(ppm.levels), dtype), ppm, conv.out_channels)
    else:
        weight, taps = SplitProduct.apply(conv.weight, reduced.to(dtype), ppm)
    output = F.conv2d(input, weight, conv.bias, padding=conv.padding, dilation=conv.dilation)
    kh, kw = conv.kernel_size
    settings: dict[str, Any] = {"dilation": conv.dilation, "align_corners": ppm.align_corners}
    folded = _folded(norm, output.dtype) if inference else None
    relu = inference and (folded is not None or type(norm) is nn.Identity) and type(activation) is nn.ReLU
    output = ops.pyramid_context_(output, taps, ppm.bins, (kh, kw), norm=folded, relu=relu, **settings)
    if folded is None:
        output = norm(output)
    return output if relu else activation(output)


def concatenation_is_cheaper(ppm: FusedPPM, height: int, width: int) -> bool:
    """Whether convolving the concatenation costs less than the levels' products with the weight.

    Measured on a CPU, 3x3, 4 levels: where the levels have more cells than the map has pixels, whatever the channels
    (bins (1, 2, 3, 6): below 7x7, (4, 8, 12, 16): below 20x20), and where the upsampled maps have so few elements that
    the number of operations decides.
    """
    pixels = height * width
    return sum(_cells(ppm)) > pixels or len(ppm.levels) * ppm.reduction_channels * pixels < 1 << 14


class SplitProduct(torch.autograd.Function):
    """A copy of the map's part of a weight (O, C + L * R, kh, kw), and the levels' part times reduced: the taps.

    The levels' part is rearranged a level at a time, in backward once more, so that no copy of the whole is kept; the
    gradient of the whole is written once.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, reduced: Tensor, ppm: FusedPPM) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, reduced)
        ctx.ppm = ppm
        first, context = _split(ppm, weight)
        levels = _level_weights(context, len(ppm.levels), reduced.dtype)
        first = ops.new_concat(first, first.size(1)).copy_(first)  # or else F.conv2d copies it, forward and backward
        return first, _multiply(reduced, levels, ppm, weight.size(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_first: Tensor, grad_taps: Tensor) -> Any:
        weight, reduced = ctx.saved_tensors
        sizes, (o, _, kh, kw) = _cells(ctx.ppm), weight.shape
        grad_reduced = torch.empty(reduced.shape, dtype=reduced.dtype, device=reduced.device)
        grad_weight = ops.new_concat(weight, weight.size(1))
        first, context = _split(ctx.ppm, grad_weight)
        first.copy_(grad_first)
        given = zip(grad_taps.split(sizes, 1), reduced.split(sizes, 1), strict=True)
        results = zip(grad_reduced.split(sizes, 1), context.chunk(len(sizes), 1), strict=True)
        levels = _level_weights(_split(ctx.ppm, weight)[1], len(sizes), reduced.dtype)
        for (g, z), (grad_z, grad_w), w in zip(given, results, levels, strict=True):
            g = g.reshape(-1, w.size(0))
            grad_z.copy_((g @ w).view(z.shape))
            grad_w.copy_((g.t() @ z.flatten(0, 1)).view(kh, kw, o, -1).permute(2, 3, 0, 1))
        return grad_weight, grad_reduced, None


def _cells(ppm: FusedPPM) -> list[int]:
    return [h * w for h, w in ppm.levels]


def _multiply(reduced: Tensor, levels: Any, ppm: FusedPPM, channels: int) -> Tensor:
    """(N, P, R) and each level's (kh * kw * O, R) -> (N, P, kh * kw, O)."""
    parts = zip(reduced.split(_cells(ppm), 1), levels, strict=True)
    # one matrix product each: F.linear of a slice copies w for every image
    products = [(z.flatten(0, 1) @ w.t()).unflatten(0, z.shape[:2]) for z, w in parts]
    return torch.cat(products, 1).unflatten(2, (-1, channels))


def _split(ppm: FusedPPM, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The input channels of the map and those of the levels, as views."""
    c, context = ppm.in_channels, ppm.out_channels - ppm.in_channels
    if ppm.concat == "input_first":
        first, levels = weight.split([c, context], 1)
    else:
        levels, first = weight.split([context, c], 1)
    return first, levels


def _level_weights(weight: Tensor, levels: int, dtype: torch.dtype) -> Any:
    """Yields each level's (kh * kw * O, R); only one exists at a time."""
    for part in weight.chunk(levels, 1):
        yield part.permute(2, 3, 0, 1).reshape(-1, part.size(1)).to(dtype)


def _split_copies(ppm: FusedPPM, weight: Tensor, dtype: torch.dtype) -> Parts:
    first, context = _split(ppm, weight.detach())
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return first.to(dtype).contiguous(memory_format=layout), list(_level_weights(context, len(ppm.levels), dtype))


def _conv_dtype(input: Tensor) -> torch.dtype:
    """The dtype of F.conv2d's result."""
    device = input.device.type
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocasts and input.dtype != torch.float64 else input.dtype


def _folded(norm: nn.Module, dtype: torch.dtype) -> Norm | None:
    """A batch norm in evaluation mode, an affine map by its buffers, as ops.pyramid_context_ takes it."""
    if not isinstance(norm, _BatchNorm) or norm.training or not norm.affine or norm.running_mean is None:
        return None
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    if any(t.dtype not in (torch.float32, dtype) or t.dtype != tensors[0].dtype for t in tensors):  # type: ignore[union-attr]
        return None
    return (*tensors, norm.eps)  # type: ignore[return-value]
