"""The levels of a FusedPPM as one computation: its tensors, read once a call, and one autograd node for all of it."""

import functools
import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import is_batch_norm, is_convolution, is_identity, is_relu, runs_only
from .ops.checks import Levels, flatten, is_channels_last

_operators: Any = torch.ops.pspnet_fast
_new_concat = _operators.new_concat.default
_pool, _pool_alone = _operators.pyramid_pool.default, _operators.pyramid_pool_alone.default
_pool_backward = _operators.pyramid_pool_backward.default
_reduce, _reduce_backward = _operators.pyramid_reduce.default, _operators.pyramid_reduce_backward.default
_norm, _norm_backward = _operators.pyramid_batch_norm.default, _operators.pyramid_batch_norm_backward.default
_upsample = _operators.pyramid_upsample_concat_.default
_upsample_backward = _operators.pyramid_upsample_concat_backward.default


class Place(NamedTuple):
    """Where the parts of a concatenation begin."""

    channels: int
    first_input: int
    first_level: int
    align_corners: bool


class Pyramid:
    """Pooling, 1x1 convolution without bias, batch norm and ReLU of all levels, as they are at one call.

    It computes what calling these layers would, running statistics and counters included, with few calls: none of the
    layers, and the operators without the checks of their wrappers, which these tensors pass by what the layers are.
    """

    def __init__(self, levels: Levels, dtype: torch.dtype) -> None:
        self.levels, self.bins, self.dtype = levels, flatten(levels), dtype
        self.weights: list[Tensor] = []
        self.norms: list[Any] = []
        self.affine: list[list[Tensor]] = [[], []]  # weights, biases
        self.running: list[list[Tensor]] = [[], []]  # means, variances

    @classmethod
    def of(cls, features: nn.ModuleList, levels: Levels, shape: tuple[int, int], input: Tensor) -> "Pyramid | None":
        """The pyramid of levels whose weights have that shape (R, C); None where a layer is, or does, anything else."""
        pyramid = cls(levels, input.dtype)
        for level in features:
            layers: list[Any] = list(level._modules.values()) if runs_only(level, nn.Sequential.forward) else []
            if len(layers) != 4 or not pyramid._add(shape, *layers):
                return None
        if any(len(t) not in (0, len(levels)) for t in (*pyramid.affine, *pyramid.running)):
            return None
        tensors = [t for part in (pyramid.affine, pyramid.running) for tensors in part for t in tensors]
        kinds = {t.dtype for t in tensors}
        if len(kinds) > 1 or not kinds <= {torch.float32, input.dtype} or not all(t.is_contiguous() for t in tensors):
            return None
        if len({id(norm) for norm in pyramid.norms}) != len(levels) or not pyramid._set_batch(input.size(0)):
            return None
        pyramid.weights = [w if w.dtype == input.dtype else w.to(input.dtype) for w in pyramid.weights]
        return pyramid

    def _add(self, shape: tuple[int, int], pooling: Any, convolution: Any, norm: Any, activation: Any) -> bool:
        if not (is_identity(pooling) and is_relu(activation) and is_convolution(convolution) and is_batch_norm(norm)):
            return False
        weight = convolution.weight
        if convolution.bias is not None or weight.shape != (*shape, 1, 1) or not is_pointwise(convolution):
            return False
        if norm.training and not runs_only(norm, _BatchNorm.forward):  # SyncBatchNorm
            return False
        if type(norm)._check_input_dim not in _DIMENSIONS or norm.num_features != shape[0]:
            return False
        affine, running = (norm.weight, norm.bias), (norm.running_mean, norm.running_var)
        if norm.training and not norm.track_running_stats and running[0] is not None:
            return False
        self.weights.append(weight)
        self.norms.append(norm)
        for parts, tensors in ((self.affine, affine), (self.running, running)):
            if (tensors[0] is None) != (tensors[1] is None):
                return False
            if tensors[0] is not None:
                parts[0].append(tensors[0])
                parts[1].append(tensors[1])
        return True

    def _set_batch(self, n: int) -> bool:
        """Which levels take their batch's statistics: as in nn.BatchNorm2d, but where there is one value a channel."""
        self.batch = []
        for norm, (h, w) in zip(self.norms, self.levels, strict=True):
            batch = norm.training or not self.running[0]
            if batch and n * h * w <= 1:
                if n == 0 or not self.running[0]:
                    return False
                warn_of_one_value()
                batch = False
            self.batch.append(int(batch))
        return True

    def _count(self) -> list[float]:
        """Counts the batches, as nn.BatchNorm2d does, and gives the share that each level's running statistics take."""
        training = [norm for norm, batch in zip(self.norms, self.batch, strict=True) if batch and norm.training]
        tracked = [norm.num_batches_tracked for norm in training if norm.track_running_stats]
        if tracked := [count for count in tracked if count is not None]:
            torch._foreach_add_(tracked, 1)
        return [_share(norm) for norm in self.norms]

    def _needs_grad(self, input: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(t.requires_grad for tensors in ([input], self.weights, *self.affine) for t in tensors)

    def reduced(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) -> (N, P, R); and the input, which whoever reads it too should read from here.

        Then the gradients of the two are added in the pass that writes that of the input.
        """
        if self._needs_grad(input):
            through, reduced, *_ = ReducedFunction.apply(self, input, *self.weights, *self.affine[0], *self.affine[1])
            return reduced, through
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self._evaluate(_pool_alone(input, self.bins)), input

    def concatenation(self, input: Tensor, place: Place) -> Tensor:
        """(N, C, H, W) -> (N, C + L * R, H, W)."""
        if self._needs_grad(input):
            tensors = input, *self.weights, *self.affine[0], *self.affine[1]
            concat: Tensor = ConcatenationFunction.apply(self, place, *tensors)[0]
            return concat
        with torch._C._AutoDispatchBelowADInplaceOrView():
            concat = _new_concat(input, place.channels)
            reduced = self._evaluate(_pool(input, concat, place.first_input, self.bins))
            _upsample(concat, reduced, place.first_level, self.bins, place.align_corners)
            return concat

    def _levels(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, P, C) -> (N, P, R) before the norms; after norm and ReLU; and what the norms normalised by."""
        reduced = _reduce(pooled, self.weights, [], [], False, self.bins)
        shares = self._count()
        written = [t for tensors in self.running for t, batch in zip(tensors, self.batch, strict=False) if batch]
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
        eps = [norm.eps for norm in self.norms]
        output, statistics = _norm(reduced, *self.affine, *self.running, self.batch, shares, eps, True, self.bins)
        return reduced, output, statistics

    def _evaluate(self, pooled: Tensor) -> Tensor:
        """(N, P, C) -> (N, P, R), of which no gradient is needed: in evaluation the norms are folded."""
        if any(self.batch) or not self.affine[0]:
            return self._levels(pooled)[1]
        folded = [t for level in zip(*self.affine, *self.running, strict=True) for t in level]
        return _reduce(pooled, self.weights, folded, [norm.eps for norm in self.norms], True, self.bins)


class _PyramidFunction(torch.autograd.Function):
    """What the two below share.

    What is kept between the operators is an output: a gradient that is recorded reaches the inputs through it, by the
    further gradients that backward then gets.
    """

    @staticmethod
    def _forward(ctx: Any, pyramid: Pyramid, input: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reduced, output, statistics = pyramid._levels(pooled)
        ctx.set_materialize_grads(False)
        ctx.settings = pyramid.batch, [norm.eps for norm in pyramid.norms], pyramid.bins
        ctx.size, ctx.channels_last = input.shape[2:], is_channels_last(input)
        ctx.save_for_backward(pooled, reduced, output, statistics, *pyramid.weights, *pyramid.affine[0])
        return output, reduced, pooled

    @staticmethod
    def _backward(ctx: Any, grad_copy: Tensor | None, offset: int, *grads: Tensor | None) -> list[Tensor | None]:
        """The gradients of the input, the weights, and the norms' weights and biases."""
        pooled, reduced, output, statistics, *tensors = ctx.saved_tensors
        batch, eps, bins = ctx.settings
        weights, norms = tensors[: len(batch)], tensors[len(batch) :]
        grad_output, grad_reduced, grad_pooled = grads
        grad_weights: Any = [None] * len(weights)
        grad_norms: Any = [None] * (2 * len(norms))
        if grad_output is not None:
            before, affine = _norm_backward(grad_output, reduced, output, norms, statistics, batch, eps, bins)
            grad_reduced = _sum(grad_reduced, before)
            if norms:  # reshape, not flatten: is_grads_batched=True knows that
                grad_norms = affine.reshape(-1, affine.size(2)).unbind()
        if grad_reduced is not None:
            before, of_weights = _reduce_backward(grad_reduced, pooled, weights, bins)
            grad_pooled = _sum(grad_pooled, before)
            grad_weights = of_weights.reshape(len(batch), *weights[0].shape).unbind()
        grad_input = None
        if ctx.needs_input_grad[-1 - len(tensors) - len(norms)]:
            if grad_pooled is None and grad_copy is not None:
                grad_pooled = grad_copy.new_zeros(pooled.shape)
            if grad_pooled is not None:
                grad_input = _pool_backward(grad_pooled, grad_copy, offset, bins, *ctx.size, ctx.channels_last)
        return [grad_input, *grad_weights, *grad_norms]


class ReducedFunction(_PyramidFunction):
    """Pyramid.reduced with its gradient."""

    @staticmethod
    def forward(ctx: Any, pyramid: Pyramid, input: Tensor, *tensors: Tensor) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            kept = _PyramidFunction._forward(ctx, pyramid, input, _pool_alone(input, pyramid.bins))
        return input, *kept

    @staticmethod
    def backward(ctx: Any, grad_input: Tensor | None, *grads: Tensor | None) -> Any:
        with _without_autograd():
            return None, *_PyramidFunction._backward(ctx, grad_input, 0, *grads)


class ConcatenationFunction(_PyramidFunction):
    """Pyramid.concatenation with its gradient."""

    @staticmethod
    def forward(ctx: Any, pyramid: Pyramid, place: Place, input: Tensor, *tensors: Tensor) -> Any:
        ctx.place = place
        with torch._C._AutoDispatchBelowADInplaceOrView():
            concat = _new_concat(input, place.channels)
            pooled = _pool(input, concat, place.first_input, pyramid.bins)
            kept = _PyramidFunction._forward(ctx, pyramid, input, pooled)
            _upsample(concat, kept[0], place.first_level, pyramid.bins, place.align_corners)
        return concat, *kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_output: Tensor | None, *grads: Tensor | None) -> Any:
        place, bins = ctx.place, ctx.settings[-1]
        with _without_autograd():
            if grad is not None:
                channels = ctx.saved_tensors[1].size(2)
                upsampled = _upsample_backward(grad, place.first_level, channels, bins, place.align_corners)
                grad_output = _sum(grad_output, upsampled)
            return None, None, *_PyramidFunction._backward(ctx, grad, place.first_input, grad_output, *grads)


def _sum(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second


def _without_autograd() -> Any:
    """For a backward that is not recorded itself; one that is meets the operators' derivatives."""
    return nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowADInplaceOrView()


def _share(norm: Any) -> float:
    """Of the running statistics, by nn.BatchNorm2d's rule: its momentum, or all batches alike."""
    if norm.momentum is not None:
        return float(norm.momentum)
    counted = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    return 1.0 / float(norm.num_batches_tracked) if counted else 0.0


def is_pointwise(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is a matrix product with every pixel."""
    plain = (
        convolution.stride == (1, 1) and convolution.groups == 1 and convolution.padding in ((0, 0), "same", "valid")
    )
    return convolution.kernel_size == (1, 1) and plain


@functools.cache
def warn_of_one_value() -> None:
    """Once."""
    warnings.warn(
        "FusedPPM: a level has one value per channel in training (batch 1, bin 1): it uses its running statistics",
        stacklevel=2,
    )


_DIMENSIONS = nn.BatchNorm2d._check_input_dim, nn.SyncBatchNorm._check_input_dim
