"""FusedPPM: the pyramid pooling module on the fused operators."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import ops
from .layers import has_statistics, is_batch_norm, is_convolution, is_identity, is_relu, needs_plain, runs_only
from .ops._library import needs_grad
from .ops.checks import Bins, Norm, as_levels, check_map, count_cells
from .pyramid import Place, Pyramid, is_pointwise, warn_of_one_value

Concat = Literal["input_first", "input_last"]
Branch = tuple[nn.Conv2d, nn.Module, nn.Module]  # 1x1 convolution, norm, activation


class FusedPPM(nn.Module):
    """Pyramid pooling module (Zhao et al., CVPR 2017, figure 3c), in place of the usual one.

    Equivalent to::

        maps = [F.interpolate(f(x), x.shape[2:], mode="bilinear", align_corners=align_corners) for f in features]
        torch.cat([x, *maps], 1)

    with `features[i] = Sequential(AdaptiveAvgPool2d(bins[i]), Conv2d(C, R, 1, bias=False), norm, activation)`: the same
    parameters and state_dict keys as semseg's PPM (`features.{i}.1.weight`, `features.{i}.2.*`), the same outputs,
    gradients and running statistics. Forward reads x once and writes the output once; backward reads the output's
    gradient once and writes that of x once. The same bits on every run, on CPU and CUDA.

    Args:
        in_channels: C, channels of the feature map.
        reduction_channels: R, channels of each level after its 1x1 convolution; C // len(bins) by default.
        bins: for each level an int or a pair (bins_h, bins_w).
        align_corners: of the bilinear upsampling, as in F.interpolate.
        concat: "input_first" for [x, levels], "input_last" for [levels, x].
        norm_layer: makes the norm of a level from R: nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity, ...
        activation: makes the activation of a level.

    Shapes: x (N, C, H, W), N >= 0, any H, W >= 1, float32, float64, bfloat16 or float16 ->
    `(N, C + len(bins) * R, H, W)` in the dtype and memory format (contiguous or channels-last) of x. Under autocast it
    runs in the dtype of x, where the stock module upcasts its upsampling on CUDA.

    In evaluation, batch norm and ReLU run inside the 1x1 convolutions. In training, a level with one value a channel
    (batch 1 and bin 1, in one process) has no batch statistics, which makes the stock module raise: here this level is
    normalised by its running statistics, which stay as they are, and one warning says so.

    Levels are called, not read, wherever calling them is more than these kernels compute: hooks, LoRA, pruning,
    subclasses and parametrizations (a weight is computed once a forward) act as in the stock module. A level must keep
    its R channels and its size. Tensor subclasses that see torch's functions, torch.jit.trace and torch.fx get the
    stock module's functions of torch, at its speed.

    Derivatives of any order, forward-mode AD and torch.func (jvp, vmap, hessian, functional_call with batches of
    parameters) are those of the stock module, at its speed (docs/derivatives.md).
    """

    def __init__(
        self,
        in_channels: int,
        reduction_channels: int | None = None,
        bins: Bins = (1, 2, 3, 6),
        align_corners: bool = True,
        concat: Concat = "input_first",
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True),
    ) -> None:
        super().__init__()
        self.levels = as_levels(bins)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f"in_channels must be an int >= 1, but is {in_channels!r}")
        if reduction_channels is None:
            reduction_channels = in_channels // len(self.levels)
            if reduction_channels < 1:
                raise ValueError(f"reduction_channels must be given where in_channels ({in_channels}) < len(bins)")
        if not isinstance(reduction_channels, int) or reduction_channels < 1:
            raise ValueError(f"reduction_channels must be an int >= 1, but is {reduction_channels!r}")
        if concat not in get_args(Concat):
            raise ValueError(f"concat must be one of {', '.join(map(repr, get_args(Concat)))}, but is {concat!r}")
        self.in_channels = in_channels
        self.reduction_channels = reduction_channels
        self.out_channels = in_channels + len(self.levels) * reduction_channels
        self.bins = tuple(bins)
        self.align_corners = align_corners
        self.concat: Concat = concat
        # index 0 stands for the pooling, which has no parameters, so that the keys are those of semseg's PPM
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.Identity(),
                nn.Conv2d(in_channels, reduction_channels, 1, bias=False),
                norm_layer(reduction_channels),
                activation(),
            )
            for _ in self.levels
        )

    @classmethod
    def from_branches(
        cls, branches: Sequence[Branch], bins: Bins, align_corners: bool = True, concat: Concat = "input_first"
    ) -> "FusedPPM":
        """A pyramid of existing modules, which it shares: their parameters, buffers and modes stay theirs.

        Args:
            branches: for each level its 1x1 convolution (C to R channels, with or without bias), norm and activation,
                nn.Identity where there is none.
            bins, align_corners, concat: as above.

        Raises:
            ValueError: a convolution is not 1x1, or the levels differ in number or channels.
        """
        if len(branches) != len(as_levels(bins)):
            raise ValueError(f"branches must hold one a level, {len(bins)} for bins {bins!r}, but hold {len(branches)}")
        first = branches[0][0]
        for convolution, _, _ in branches:
            c, r = convolution.in_channels, convolution.out_channels
            if not is_pointwise(convolution) or (c, r) != (first.in_channels, first.out_channels):
                raise ValueError(f"branches must be 1x1 convolutions of the same channels, but hold {convolution}")
        with torch.device("meta"):  # weights to be thrown away: no memory and no random numbers for them
            ppm = cls(c, r, bins, align_corners, concat, norm_layer=lambda _: nn.Identity(), activation=nn.Identity)
        ppm.features = nn.ModuleList(nn.Sequential(nn.Identity(), *branch) for branch in branches)
        return ppm

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + len(bins) * R, H, W).

        Raises:
            TypeError, ValueError: input is no such map; a level, exchanged for another, gives other channels or sizes.
        """
        if needs_plain(input):
            return self._plain(input)
        self._check(input)
        c = self.in_channels
        context = self.out_channels - c
        first_input, first_level = (0, c) if self.concat == "input_first" else (context, 0)
        if pyramid := self._pyramid(input):
            return pyramid.concatenation(input, Place(self.out_channels, first_input, first_level, self.align_corners))
        output = ops.new_concat(input, self.out_channels)
        pooled = ops.pyramid_pool(input, self.bins, concat=output, offset=first_input)
        reduced = self._reduce(pooled)
        return ops.pyramid_upsample_concat_(
            output, reduced, self.bins, offset=first_level, align_corners=self.align_corners
        )

    def _check(self, input: Tensor) -> None:
        check_map("input", input)
        if input.size(1) != self.in_channels:
            raise ValueError(
                f"input must have in_channels = {self.in_channels} channels, but has shape {tuple(input.shape)}"
            )

    def _plain(self, input: Tensor) -> Tensor:
        """The same by torch's functions."""
        size = input.shape[2:]
        pooled = [F.adaptive_avg_pool2d(input, level) for level in self.levels]
        maps = [_call(level, z) for level, z in zip(self.features, pooled, strict=True)]
        maps = [F.interpolate(z, size, mode="bilinear", align_corners=self.align_corners).type_as(input) for z in maps]
        return torch.cat([input, *maps] if self.concat == "input_first" else [*maps, input], 1)

    def _pyramid(self, input: Tensor) -> Pyramid | None:
        """The levels as one computation, where they are batch norm and ReLU; a compiler joins calls by itself."""
        if torch.compiler.is_compiling():
            return None
        return Pyramid.of(self.features, self.levels, (self.reduction_channels, self.in_channels), input)

    def _is_branch(self, level: Any) -> bool:
        """Whether calling a level calls convolution, norm and activation, the first being what pyramid_reduce does."""
        if not (runs_only(level, nn.Sequential.forward) and len(level) == 4):
            return False
        pooling, convolution, _, _ = level
        if not (is_identity(pooling) and is_convolution(convolution) and is_pointwise(convolution)):
            return False
        return convolution.weight.shape == (self.reduction_channels, self.in_channels, 1, 1)

    def _reduce(self, pooled: Tensor) -> Tensor:
        """1x1 convolution, norm and activation of all levels: (N, P, C) -> (N, P, R)."""
        if not all(map(self._is_branch, self.features)):  # hooks, LoRA and the like: what they are is theirs
            return self._each_level(pooled, lambda i, z: _call(self.features[i], z.contiguous()))
        _, convolutions, norms, activations = zip(*self.features, strict=True)
        weights = [convolution.weight.to(pooled.dtype) for convolution in convolutions]
        biases = [convolution.bias for convolution in convolutions]
        statistics = [_affine(norm, bias) for norm, bias in zip(norms, biases, strict=True)]
        folded = [level for level in statistics if level is not None]
        if len(folded) == len(norms) and not needs_grad(pooled, *weights, *(t for level in folded for t in level[:4])):
            dtype = folded[0][0].dtype  # the operator takes one for all
            folded = [(*(t.to(dtype) for t in level[:4]), level[4]) for level in folded]  # type: ignore[misc]
            relu = all(map(is_relu, activations))
            reduced = ops.pyramid_reduce(pooled, weights, self.bins, norm=folded, relu=relu)
            return reduced if relu else self._each_level(reduced, lambda i, z: activations[i](z))
        reduced = ops.pyramid_reduce(pooled, weights, self.bins)

        def rest(i: int, z: Tensor) -> Tensor:
            bias = biases[i]
            z = z if bias is None else z + bias.to(z.dtype)[:, None, None]
            return activations[i](_normalize(norms[i], z))

        return self._each_level(reduced, rest)

    def _each_level(self, cells: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Applies function(i, (N, ..., bins_h, bins_w)) to every level of (N, P, ...): (N, P, R)."""
        n, _, c = cells.shape
        parts = cells.split([count_cells((level,)) for level in self.levels], 1)
        results = []
        for i, (part, level) in enumerate(zip(parts, self.levels, strict=True)):
            # permuted last: a view of a transposed batch of 1 has a first stride with which torch's batch norm computes
            # wrong gradients (2.13)
            z = function(i, part.reshape(n, *level, c).permute(0, 3, 1, 2))
            if z.shape != (expected := (n, self.reduction_channels, *level)):
                raise ValueError(f"features[{i}] must give a map of shape {expected}, but gives {tuple(z.shape)}")
            results.append(z.to(cells.dtype).permute(0, 2, 3, 1).reshape(n, part.size(1), self.reduction_channels))
        return torch.cat(results, 1)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.in_channels}, {self.reduction_channels}, bins={self.bins}, align_corners={self.align_corners}, "
            f"concat={self.concat!r}"
        )


def _affine(norm: nn.Module, bias: Tensor | None) -> Norm | None:
    """A norm that is an affine map by its buffers, the convolution's bias in it, as ops.pyramid_reduce takes it."""
    if has_statistics(norm):
        mean: Any = norm.running_mean if bias is None else norm.running_mean - bias  # type: ignore[operator]
        return norm.weight, norm.bias, mean, norm.running_var, norm.eps  # type: ignore[return-value]
    if is_identity(norm) and bias is not None:
        one = torch.ones_like(bias)
        return one, bias, torch.zeros_like(bias), one, 0.0
    return None


def _normalize(norm: nn.Module, z: Tensor) -> Tensor:
    """norm(z)."""
    if not isinstance(norm, (_BatchNorm, nn.Identity)):
        return norm(z.contiguous())  # torch's derivatives of group norm of higher order know no other layout
    return _call(norm, z)


def _call(module: nn.Module, z: Tensor) -> Tensor:
    """module(z), but batch norms in training use their running statistics where z leaves them one value a channel."""
    one_value = module.training and isinstance(z, Tensor) and z.size(0) * z.size(2) * z.size(3) == 1
    norms = [norm for norm in module.modules() if _trains(norm)] if one_value else []
    if not norms:
        return module(z)
    if not torch.compiler.is_compiling():
        warn_of_one_value()
    if is_batch_norm(module):
        norm: Any = module
        return F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    for norm in norms:
        norm.training = False
    try:
        return module(z)
    finally:
        for norm in norms:
            norm.training = True


def _trains(norm: nn.Module) -> bool:
    """Whether a batch norm normalises by the batch alone though it has running statistics."""
    if not (isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None):
        return False
    return not (hasattr(norm, "process_group") and _world_size(norm.process_group) > 1)


def _world_size(process_group: Any) -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(process_group)
