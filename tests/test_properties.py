"""The operators of maps and cells on random shapes, strides, dtypes and values, extreme ones too."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from properties import (
    ANY,
    DTYPES,
    Draw,
    accumulator,
    assert_within,
    gradients,
    holds_for_all,
    interpolation_steps,
    judge,
    kinds,
    kinds_between,
    least,
    magnitude,
    spread,
    unit,
    without_zero_weights,
)
from torch import Tensor

from pspnet_fast import ops, reference
from pspnet_fast.ops.checks import as_levels, count_cells

CONCAT = ["contiguous", "channels last"]


def norms(draw: Draw, channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """weight, bias, running_mean, running_var."""
    weight, bias, mean, var = (draw.values((channels,), dtype, ["normal", "one value"]) for _ in range(4))
    return tuple(map(draw.place, (weight, bias, mean, var.square())))


@holds_for_all
def test_pyramid_pool(draw: Draw) -> None:
    n, c, (h, w), bins, dtype = draw.integer(0, 3), draw.integer(1, 9), draw.size(), draw.bins(), draw.choice(DTYPES)
    x, copies, offset, other = (
        draw.tensor((n, c, h, w), dtype, ANY),
        draw.flag(),
        draw.integer(0, 3),
        draw.integer(0, 2),
    )
    levels = as_levels(bins)
    grad = draw.tensor((n, count_cells(levels), c), dtype)
    steps = h * w + count_cells(levels) + 8
    inputs = [x, grad]

    def pool(x: Tensor) -> Tensor:
        return reference.pyramid_pool(x, bins)

    if not copies:
        ours = draw.compute(lambda: gradients(lambda x: ops.pyramid_pool(x, bins), 1)(*inputs))
        terms = gradients(pool, 1)(*map(magnitude, inputs))
        judge(ours, gradients(pool, 1), inputs, terms, steps)
        return
    concat = draw.tensor((n, offset + c + other, h, w), dtype, layouts=CONCAT)
    part = concat.narrow(1, offset, c)
    ours = draw.compute(lambda: [ops.pyramid_pool(x, bins, concat=concat, offset=offset), part], part)
    judge(ours[:1], lambda x: [pool(x)], [x], [pool(magnitude(x))], steps)
    assert_within(ours[1], x.double(), torch.zeros(x.shape))
    grad_copy = draw.tensor(part.shape, dtype)

    def both(function: Callable[..., Tensor], concat: Tensor, x: Tensor, *grads: Tensor) -> list[Tensor]:
        x, concat = x.detach().requires_grad_(), concat.detach().clone()
        pooled = function(x, bins, concat=concat, offset=offset)
        return list(torch.autograd.grad([pooled, concat.narrow(1, offset, c)], [x], [g.to(x.dtype) for g in grads]))

    inputs = [concat, x, grad, grad_copy]
    ours = draw.compute(lambda: both(ops.pyramid_pool, *inputs))
    terms = both(reference.pyramid_pool, *map(magnitude, inputs))
    judge(ours, lambda *t: both(reference.pyramid_pool, *t), inputs, terms, steps)


@holds_for_all
def test_pyramid_reduce(draw: Draw) -> None:
    n, c, r, bins, dtype = draw.integer(0, 3), draw.integer(1, 20), draw.integer(1, 9), draw.bins(), draw.choice(DTYPES)
    levels = as_levels(bins)
    pooled = draw.tensor((n, count_cells(levels), c), dtype, ANY)
    shape = (r, c, 1, 1) if draw.flag() else (r, c)
    weights = [draw.tensor(shape, dtype, ["normal", "integers"]) for _ in levels]
    inference, relu, eps = draw.flag(), draw.flag(), draw.choice([0.1, 1e-5])
    steps = c + r + n * pooled.size(1) + 16
    if not inference:
        inputs = [pooled, *weights, draw.tensor((n, count_cells(levels), r), dtype)]

        def run(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
            return gradients(lambda pooled, *weights: function(pooled, weights, bins), 1 + len(levels))

        ours = draw.compute(lambda: run(ops.pyramid_reduce)(*inputs))
        judge(
            ours, run(reference.pyramid_reduce), inputs, run(reference.pyramid_reduce)(*map(magnitude, inputs)), steps
        )
        return
    kind = draw.choice([dtype, torch.float32]) if dtype != torch.float64 else dtype
    tensors = [norms(draw, r, kind) for _ in levels] if draw.flag() else None

    def reduce(function: Callable[..., Tensor], size: Callable[[Tensor], Tensor], sign: float) -> Tensor:
        norm = None
        if tensors is not None:
            norm = [(size(w), size(b), sign * size(m), v.to(size(v).dtype), eps) for w, b, m, v in tensors]
        return function(size(pooled), [size(w) for w in weights], bins, norm=norm, relu=relu)

    ours = draw.compute(lambda: [reduce(ops.pyramid_reduce, lambda t: t, 1)])
    wide = accumulator(dtype)
    truth, stock = (reduce(reference.pyramid_reduce, lambda t, k=k: t.to(k), 1) for k in (torch.float64, wide))
    slack = steps * (unit(dtype) * reduce(reference.pyramid_reduce, magnitude, -1) + least(dtype))
    assert_within(ours[0], truth, slack, kinds(truth) == kinds(stock))


@holds_for_all
def test_pyramid_batch_norm(draw: Draw) -> None:
    """With an eps of 0.1, by which errors grow tenfold at most, and no ReLU, whose gradient jumps."""
    n, r, bins, dtype = draw.integer(1, 3), draw.integer(1, 70), draw.bins(), draw.choice(DTYPES)
    levels = as_levels(bins)
    kind = torch.float32 if dtype != torch.float64 and draw.flag() else dtype
    training = [draw.flag() and n * count_cells((level,)) > 1 for level in levels]
    tensors = [norms(draw, r, kind) for _ in levels]
    shape = n, count_cells(levels), r
    reduced, grad = (draw.tensor(shape, dtype, ["normal", "integers", "one value"]) for _ in range(2))
    inputs = [reduced, *(t for level in tensors for t in level[:2]), grad]

    def run(module: Any, wide: torch.dtype | None = None) -> list[Tensor]:
        running = [[t.contiguous().clone() for t in level[2:]] for level in tensors]
        running = running if wide is None else [[t.to(wide) for t in pair] for pair in running]

        def function(reduced: Tensor, *affine: Tensor) -> Tensor:
            norm = [(*affine[2 * i : 2 * i + 2], *pair, 0.1) for i, pair in enumerate(running)]
            return module.pyramid_batch_norm(reduced, bins, norm, training=training, momentum=[0.3] * len(levels))

        # dense: torch's batch norm (2.13) reads past an expanded weight
        given = inputs if wide is None else [t.to(wide).clone(memory_format=torch.contiguous_format) for t in inputs]
        results = gradients(function, len(inputs) - 1)(*given)
        return [*results, *(t for pair in running for t in pair)]

    ours, exact = draw.compute(lambda: run(ops)), run(reference, torch.float64)
    for result, truth in zip(ours, exact, strict=True):
        scale = truth.abs().max().clamp(min=1) * max(t.double().abs().max().clamp(min=1) for t in inputs) ** 2
        slack = scale * unit(dtype) * 100 * (shape[0] * shape[1] + 8)
        assert_within(result, truth, slack.expand(truth.shape))


@holds_for_all
def test_pyramid_split_weight(draw: Draw) -> None:
    """Every bit of the parts, whatever the values; and of the gradient, in which they are put together."""
    o, dense, levels, r = draw.integer(1, 5), draw.integer(1, 70), draw.integer(1, 4), draw.integer(1, 70)
    kernel, dtype = (draw.integer(1, 7), draw.integer(1, 6)), draw.choice(DTYPES)
    parts = draw.choice([torch.bfloat16, torch.float16]) if dtype == torch.float32 and draw.flag() else dtype
    weight = draw.tensor((o, dense + levels * r, *kernel), dtype, ANY)
    settings = {"dense_first": draw.flag(), "dtype": parts}
    grads = draw.tensor((o, dense, *kernel), parts), draw.tensor((levels, kernel[0] * kernel[1] * o, r), parts)

    def run(module: Any) -> list[Tensor]:
        leaf = weight.detach().requires_grad_()
        results = module.pyramid_split_weight(leaf, dense, levels, **settings)
        return [*results, *torch.autograd.grad(results, leaf, grads)]

    for result, truth in zip(draw.compute(lambda: run(ops)), run(reference), strict=True):
        torch.testing.assert_close(result, truth, rtol=0, atol=0, equal_nan=True)


@holds_for_all
def test_pyramid_upsample_concat(draw: Draw) -> None:
    n, r, (h, w), bins, dtype = draw.integer(0, 3), draw.integer(1, 9), draw.size(), draw.bins(), draw.choice(DTYPES)
    levels, align_corners = as_levels(bins), draw.flag()
    offset, other = draw.integer(0, 3), draw.integer(0, 2)
    reduced = draw.tensor((n, count_cells(levels), r), dtype, kinds_between(levels, (h, w)))
    concat = draw.tensor((n, offset + len(levels) * r + other, h, w), dtype, layouts=CONCAT)
    part = concat.narrow(1, offset, len(levels) * r)
    settings = {"offset": offset, "align_corners": align_corners}
    ours = draw.compute(lambda: [ops.pyramid_upsample_concat_(concat, reduced, bins, **settings), part][1:], part)
    steps = interpolation_steps(tuple(max(b) for b in zip(*levels, strict=True)))

    def upsample(reduced: Tensor) -> list[Tensor]:
        return [reference.upsample_levels(reduced, bins, (h, w), align_corners)]

    terms = upsample(spread(magnitude(reduced), levels))
    judge(ours, upsample, [reduced], terms, steps, without_zero_weights(upsample))

    grad = draw.tensor(concat.shape, dtype)

    def run(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        def write(concat: Tensor, reduced: Tensor) -> Tensor:
            return function(concat * 1, reduced, bins, **settings)

        return lambda *inputs: gradients(write, 2)(*inputs)[1:]

    inputs = [concat, reduced.nan_to_num(), grad]
    ours = draw.compute(lambda: run(ops.pyramid_upsample_concat_)(*inputs))
    before, cells = run(reference.pyramid_upsample_concat_)(*map(magnitude, inputs))
    terms = [before, spread(cells, levels)]
    judge(ours, run(reference.pyramid_upsample_concat_), inputs, terms, steps + h * w)


@holds_for_all
def test_pyramid_context(draw: Draw) -> None:
    n, o, (h, w), bins, dtype = (
        draw.integer(0, 2),
        draw.integer(1, 9),
        draw.size(),
        draw.bins(2, 4),
        draw.choice(DTYPES),
    )
    levels = as_levels(bins)
    kernel = draw.choice([1, 3, (1, 3), (5, 1)])
    dilation = draw.choice([1, 2, (3, 1), 12])
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    taps = draw.tensor((n, count_cells(levels), kh * kw, o), dtype, kinds_between(levels, (h, w)))
    conv = draw.tensor((n, o, h, w), dtype, ANY, CONCAT)
    settings = {"dilation": dilation, "align_corners": draw.flag(), "mode": draw.choice(["bilinear", "nearest"])}
    steps = interpolation_steps(tuple(max(b) for b in zip(*levels, strict=True))) + len(levels) * kh * kw + 16
    wide = accumulator(dtype)
    if draw.flag():
        kind = draw.choice([dtype, torch.float32]) if dtype != torch.float64 else dtype
        tensors, relu, eps = norms(draw, o, kind) if draw.flag() else None, draw.flag(), draw.choice([0.1, 1e-5])

        def add(function: Callable[..., Tensor], conv: Tensor, taps: Tensor, norm: Sequence[Tensor]) -> Tensor:
            norm = (*norm, eps) if norm else None
            return function(conv, taps, bins, kernel, norm=norm, relu=relu, **settings)

        ours = draw.compute(lambda: [add(ops.pyramid_context_, conv, taps, tensors)], conv)
        plain = reference.pyramid_context_
        truth, stock, other = (
            add(function, conv.to(k, copy=True), taps.to(k), [t.to(k) for t in tensors or ()])
            for function, k in ((plain, torch.float64), (plain, wide), (without_zero_weights(plain), torch.float64))
        )
        sizes = [magnitude(t) for t in tensors or ()]
        if sizes:
            sizes[2] *= -1
        terms = add(plain, magnitude(conv), spread(magnitude(taps), levels), sizes)
        slack = steps * (unit(dtype) * terms + least(dtype))
        assert_within(ours[0], truth, slack, kinds(truth) == kinds(stock), other)
        return
    inputs = [conv, taps, draw.tensor((n, o, h, w), dtype)]

    def run(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        return gradients(lambda conv, taps: function(conv * 1, taps, bins, kernel, **settings), 2)

    ours = draw.compute(lambda: run(ops.pyramid_context_)(*inputs))
    sizes = [magnitude(t) for t in inputs]
    terms = run(reference.pyramid_context_)(sizes[0], spread(sizes[1], levels), sizes[2])
    terms[2] = spread(terms[2], levels)
    truth = run(reference.pyramid_context_)
    judge(ours, truth, inputs, terms, steps + h * w, without_zero_weights(truth))
