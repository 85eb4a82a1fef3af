"""The operators as functions to differentiate, for the tests of derivatives and transforms."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pspnet_fast import ops, reference

BINS = (1, (2, 3))  # 7 cells
RAW = [1, 1, 2, 3]
DOUBLE = torch.float64


class Case(NamedTuple):
    """A function of an operator: (ops or reference) -> function of the inputs, linear in none of them."""

    function: Callable[..., Callable[..., Tensor]]
    shapes: Sequence[tuple[int, ...]]
    forward_only: bool = False  # an operator without a gradient: reverse mode is refused


def pool(module):
    return lambda x: module.pyramid_pool(x.sin(), BINS).cos()


def pool_into(module):
    def function(x: Tensor, before: Tensor) -> Tensor:
        concat = before.sin()
        pooled = module.pyramid_pool(x, BINS, concat=concat, offset=1)
        return pooled.sum().sin() * concat.sin()

    return function


def reduce(module):
    return lambda pooled, *weights: module.pyramid_reduce(pooled, weights, BINS).sin()


def reduce_folded(module):
    def function(pooled: Tensor, first: Tensor, second: Tensor, *norm: Tensor) -> Tensor:
        weight, bias, mean, variance = norm
        level = weight, bias, mean, variance.exp(), 0.1
        return module.pyramid_reduce(pooled, [first, second], BINS, norm=[level, level], relu=True).sin()

    return function


def batch_norm(training: bool):
    """In training without running statistics, which torch.func does not let be written."""

    def of(module):
        def function(reduced: Tensor, *affine: Tensor) -> Tensor:
            running = [None, None] if training else [torch.full((2,), 0.3).double(), torch.full((2,), 0.7).double()]
            norm = [(*affine[2 * i : 2 * i + 2], *running, 0.1) for i in range(2)]
            flags = [training] * 2
            return module.pyramid_batch_norm(reduced, BINS, norm, training=flags, momentum=[0.1] * 2, relu=True).sin()

        return function

    return of


def split(module):
    def function(weight: Tensor) -> Tensor:
        dense, matrices = module.pyramid_split_weight(weight.sin(), 2, 3, dense_first=False)
        return dense.sum().sin() * matrices.sin()

    return function


def upsample(module):
    def function(before: Tensor, reduced: Tensor) -> Tensor:
        concat = before.sin()
        return module.pyramid_upsample_concat_(concat, reduced, BINS, offset=1, align_corners=False).sin()

    return function


def pool_and_upsample(first: int):
    """The concatenation's gradient is handed on where the levels stand beside the copy."""

    def of(module):
        def function(x: Tensor, reduced: Tensor) -> Tensor:
            concat = x.new_zeros(x.size(0), 9, *x.shape[2:])
            reduced = reduced + module.pyramid_pool(x.sin(), BINS, concat=concat, offset=2)
            return module.pyramid_upsample_concat_(concat, reduced, BINS, offset=first).sin()

        return function

    return of


def context(**settings):
    def of(module):
        def function(conv: Tensor, taps: Tensor) -> Tensor:
            sum = module.pyramid_context_(conv.sin(), taps, BINS, (3, 5), dilation=(2, 1), **settings)
            return sum.sin() * conv.cos()  # conv counts also where it is only written to

        return function

    return of


def context_folded(module):
    def function(conv: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        norm = weight, bias, mean, variance.exp(), 0.1
        return module.pyramid_context_(conv.sin(), taps, BINS, 3, norm=norm, relu=True).sin()

    return function


def cross_entropy(**options):
    target = torch.randint(0, 4, (2, 7, 9), generator=torch.Generator().manual_seed(1))
    target[0, 0, :3] = 255
    return lambda module: lambda logits: module.upsample_cross_entropy(logits, target[: len(logits)], **options)


def confidence(module):
    return lambda logits: module.upsample_argmax(logits, (5, 6), align_corners=True, return_confidence=True)[1]


def accumulate(module):
    def function(before: Tensor, logits: Tensor) -> Tensor:
        map = before.sin()
        return module.upsample_softmax_accumulate_(map, logits, align_corners=False, top=1, mirrored=True, weight=0.5)

    return function


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=DOUBLE)
CASES = {
    "pyramid_pool": Case(pool, [(2, 3, 5, 4)]),
    "pyramid_pool into concat": Case(pool_into, [(2, 3, 5, 4), (2, 5, 5, 4)]),
    "pyramid_reduce": Case(reduce, [(2, 7, 3), (2, 3), (2, 3, 1, 1)]),
    "pyramid_reduce, norm, relu": Case(reduce_folded, [(2, 7, 3), (2, 3), (2, 3), *[(2,)] * 4], forward_only=True),
    "pyramid_batch_norm, training": Case(batch_norm(True), [(2, 7, 2), *[(2,)] * 4]),
    "pyramid_batch_norm, evaluation": Case(batch_norm(False), [(2, 7, 2), *[(2,)] * 4]),
    "pyramid_split_weight": Case(split, [(2, 8, 3, 1)]),
    "pyramid_upsample_concat_": Case(upsample, [(2, 6, 5, 4), (2, 7, 2)]),
    "pyramid_upsample_concat_ beside the copy": Case(pool_and_upsample(4), [(2, 2, 4, 4), (2, 7, 2)]),
    "pyramid_upsample_concat_ over the copy": Case(pool_and_upsample(3), [(2, 2, 4, 4), (2, 7, 2)]),
    "pyramid_context_": Case(context(), [(2, 2, 5, 4), (2, 7, 15, 2)]),
    "pyramid_context_, nearest": Case(context(mode="nearest"), [(2, 2, 5, 4), (2, 7, 15, 2)]),
    "pyramid_context_, written alone": Case(context(accumulate=False), [(2, 2, 5, 4), (2, 7, 15, 2)]),
    "pyramid_context_, norm, relu": Case(context_folded, [(2, 2, 5, 4), (2, 7, 9, 2), *[(2,)] * 4], forward_only=True),
    "upsample_cross_entropy": Case(cross_entropy(), [(2, 4, 3, 4)]),
    "upsample_cross_entropy, weighted": Case(cross_entropy(weight=WEIGHT, label_smoothing=0.1), [(2, 4, 3, 4)]),
    "upsample_cross_entropy, none": Case(cross_entropy(reduction="none", align_corners=False), [(2, 4, 3, 4)]),
    "upsample_cross_entropy, sum": Case(cross_entropy(reduction="sum", label_smoothing=0.2), [(2, 4, 7, 9)]),
    "upsample_argmax, confidence": Case(confidence, [(2, 3, 2, 3)], forward_only=True),
    "upsample_softmax_accumulate_": Case(accumulate, [(2, 3, 5, 4), (2, 3, 2, 3)], forward_only=True),
}
REVERSE = [name for name, case in CASES.items() if not case.forward_only]


def inputs(case: Case, *batch: int) -> list[Tensor]:
    return [torch.randn(*batch, *shape, dtype=DOUBLE) for shape in case.shapes]


def assert_same(run: Callable[[Callable[..., Tensor]], object], case: Case) -> None:
    """run(function) is the same for the operator and its reference, and not trivially so."""
    ours, expected = run(case.function(ops)), run(case.function(reference))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    assert all(bool(t.detach().ne(0).any()) for t in torch.utils._pytree.tree_leaves(ours))


every_operator = pytest.mark.parametrize("name", CASES)
every_differentiable_operator = pytest.mark.parametrize("name", REVERSE)
