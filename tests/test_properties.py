"""The operators on random shapes, strides, dtypes and values, extreme ones too, against the float64 reference."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from properties import (
    ANY,
    DTYPES,
    Draw,
    accumulator,
    assert_within,
    holds_for_all,
    interpolation_steps,
    judge,
    kinds,
    kinds_between,
    least,
    magnitude,
    spread,
    spread_map,
    unit,
    without_zero_weights,
)
from torch import Tensor

from pspnet_fast import ops, reference
from pspnet_fast.ops.checks import as_levels, count_cells

CONCAT = ["contiguous", "channels last"]


def gradients(function: Callable[..., Tensor], count: int) -> Callable[..., list[Tensor]]:
    """Of (inputs..., gradient of the result): the result, and the gradients of the first `count` inputs."""

    def run(*inputs: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs[:count]]
        result = function(*leaves, *inputs[count:-1])
        return [result.detach(), *torch.autograd.grad(result, leaves, inputs[-1].to(result.dtype))]

    return run


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


# ---- upsampled logits --------------------------------------------------------------------------------------------


def upsampled(logits: Tensor, size: tuple[int, int], align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Upsampled logits in float64, how far off they may be, and (N, 1, H, W) the pixels where that is known.

    A logit of -infinity does not count where its weight is 0. Whether a weight is 0 may depend on a rounding: pixels
    where float32 and float64 give different kinds are left out.
    """

    def upsample(values: Tensor) -> Tensor:
        return F.interpolate(values, size, mode="bilinear", align_corners=align_corners)

    def exact(dtype: torch.dtype) -> Tensor:
        off = logits == -torch.inf
        values = upsample(logits.to(dtype).masked_fill(off, 0))
        below = torch.where(values < torch.inf, -torch.inf, torch.nan)  # NaN and +infinity prevail
        return torch.where(upsample(off.to(dtype)) > 0, below, values)

    values, stock = exact(torch.float64), exact(accumulator(logits.dtype))
    steps = interpolation_steps(logits.shape[2:])
    slack = steps * (unit(logits.dtype) * upsample(spread_map(magnitude(logits))) + least(logits.dtype))
    return values, slack, (kinds(values) == kinds(stock)).all(1, keepdim=True)


def logits_to(draw: Draw, most: int) -> tuple[Tensor, tuple[int, int]]:
    """Logits, and the size to upsample to."""
    source = draw.size(6)
    size = source if draw.choice([True, False, False]) else draw.size(most)
    shape = (draw.integer(0, 2), draw.choice([1, 2, 3, 5, 8, 19]), *source)
    return draw.tensor(shape, draw.choice(DTYPES), ANY), size


@holds_for_all
def test_upsample_argmax(draw: Draw) -> None:
    (logits, size), align_corners, confidence = logits_to(draw, 12), draw.flag(), draw.flag()
    settings = {"align_corners": align_corners, "return_confidence": confidence}

    def run() -> list[Tensor]:
        result = ops.upsample_argmax(logits, size, **settings)
        return list(result) if confidence else [result]

    classes, *rest = draw.compute(run)
    values, slack, sure = upsampled(logits, size, align_corners)
    sure = sure[:, 0]
    assert classes.dtype == torch.uint8
    assert classes.shape == sure.shape
    nan = values.isnan().any(1)
    if values.numel() == 0:
        return
    expected = values.isnan().int().argmax(1)
    assert torch.equal(classes.long()[nan & sure], expected[nan & sure])
    picked = classes.long()[:, None]
    chosen, best = (values + slack).gather(1, picked)[:, 0], (values - slack).amax(1)
    assert ((chosen >= best) | nan | ~sure).all()
    if size == tuple(logits.shape[2:]):  # nothing is rounded: among equal ones the first
        assert torch.equal(classes.long()[sure], values.argmax(1)[sure])
    if confidence:
        truth = values.softmax(1).amax(1)
        top = (values + slack).amax(1, keepdim=True), (values - slack).amax(1, keepdim=True)
        least_, most = (1 / (values + s - t).exp().sum(1) for s, t in ((slack, top[1]), (-slack, top[0])))
        rounding = (values.size(1) + 16) * unit(logits.dtype)
        off = torch.maximum(truth - least_, most - truth) + rounding
        assert_within(rest[0], truth, off, sure)


@holds_for_all
def test_upsample_softmax_accumulate(draw: Draw) -> None:
    (logits, (h, w)), align_corners, mirrored = logits_to(draw, 9), draw.flag(), draw.flag()
    top, left, below, right = (draw.integer(0, 2) for _ in range(4))
    weight, dtype = draw.choice([1.0, 0.25, 0.0, -2.0]), accumulator(logits.dtype)
    n, k = logits.shape[:2]
    probabilities = draw.tensor((n, k, top + h + below, left + w + right), dtype, ["normal", "one value"], MAPS)
    part = probabilities[:, :, top : top + h, left : left + w]
    settings = {"align_corners": align_corners, "top": top, "left": left, "size": (h, w), "mirrored": mirrored}
    if draw.flag() and not below + right:
        settings.pop("size")

    def run() -> list[Tensor]:
        ops.upsample_softmax_accumulate_(probabilities, logits, weight=weight, **settings)
        return [part]

    (ours,) = draw.compute(run, part)
    values, slack, sure = upsampled(logits, (h, w), align_corners)
    truth = values.softmax(1)
    low, high = ((values + sign * slack - (values - sign * slack).logsumexp(1, True)).exp() for sign in (-1, 1))
    off = torch.maximum(truth - low, high.clamp(max=1) - truth) + (k + 16) * unit(logits.dtype) * truth
    off = off + 100 * torch.finfo(dtype).tiny  # below that, they count as 0
    if mirrored:
        truth, off, sure = truth.flip(3), off.flip(3), sure.flip(3)
    exact = part.double() + weight * truth
    rounding = 2 * unit(logits.dtype) * (part.double().abs() + abs(weight) * truth)
    assert_within(ours, exact, abs(weight) * off + rounding, sure.expand_as(exact))


MAPS = ["contiguous", "channels last", "channels", "channels of channels last", "any"]


@holds_for_all
def test_upsample_cross_entropy(draw: Draw) -> None:
    (logits, size), align_corners = logits_to(draw, 9), draw.flag()
    n, k = logits.shape[:2]
    ignore, smoothing = draw.choice([255, -100, 0]), draw.choice([0.0, 0.1, 1.0])
    reduction = draw.choice(["none", "mean", "sum"])
    wide = accumulator(logits.dtype)
    weight = None
    if draw.flag():
        weight = draw.place(draw.values((k,), draw.choice([torch.float32, wide]), ["normal", "integers"]).abs())
    target_dtype = draw.choice([torch.int16, torch.int32, torch.int64] + [torch.uint8] * (ignore >= 0))
    generator = torch.Generator().manual_seed(draw.integer(0, 999))
    classes = torch.randint(0, k, (n, *size), generator=generator)
    classes[torch.rand(classes.shape, generator=generator) < draw.choice([0.0, 0.3, 1.0])] = ignore
    target = draw.place(classes.to(target_dtype))
    classes = target.long()
    settings = {"ignore_index": ignore, "label_smoothing": smoothing, "reduction": reduction}
    shape = target.shape if reduction == "none" else ()
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(wide)

    def run(logits: Tensor, grad: Tensor) -> list[Tensor]:
        loss = ops.upsample_cross_entropy(logits, target, None, align_corners, weight, **settings)
        return [loss, *(torch.autograd.grad(loss, logits, grad) if logits.requires_grad else ())]

    with_gradient = draw.flag()
    ours = draw.compute(lambda: run(logits.detach().requires_grad_(with_gradient), grad))

    # The loss of a pixel is the sum over classes of expected * (log-sum-exp - value).
    values, slack, sure = upsampled(logits, size, align_corners)
    u = unit(logits.dtype)
    counted = target != ignore
    one_hot = F.one_hot(classes * counted, k).permute(0, 3, 1, 2).double() * counted[:, None]
    factors = torch.ones(k, dtype=torch.float64) if weight is None else weight.to(wide).double()
    expected = (one_hot * (1 - smoothing) + counted[:, None].double() * smoothing / k) * factors[:, None, None]
    total = (one_hot * factors[:, None, None]).sum() if reduction == "mean" else torch.tensor(1.0).double()
    share_of_mean = torch.where(total == 0, 0.0, 1 / total)  # the mean over nothing is 0
    truth = F.cross_entropy(
        values, target.long(), factors, ignore_index=ignore, label_smoothing=smoothing, reduction="none"
    )
    lse = values.logsumexp(1, True)
    low, high = ((values + sign * slack).logsumexp(1, True) for sign in (-1, 1))
    rounding = (k + 16) * u * (1 + lse.abs() + values.abs())
    cost = lse - values
    off = torch.maximum(cost - (low - values - slack), (high - values + slack) - cost) + rounding
    off = (expected * torch.where(expected > 0, off + 4 * u * cost.abs(), 0)).sum(1)
    sure = sure[:, 0] | ~counted
    if reduction != "none":
        off = (off.sum() + (target.numel() + 4) * u * truth.abs().sum()) * share_of_mean
        truth, sure = truth.sum() * share_of_mean, sure.all()
    assert ours[0].dtype == wide
    assert_within(ours[0], truth, off, sure)
    if not with_gradient or not (values.isfinite().all() and values.numel()):
        return

    scale = (grad.double()[:, None] if reduction == "none" else grad.double()) * share_of_mean
    share = (values - lse).exp()
    least_, most = (values - slack - high - rounding).exp(), (values + slack - low + rounding).exp().clamp(max=1)
    off = torch.maximum(share - least_, most - share)
    sums = expected.sum(1, True)
    exact = scale * (share * sums - expected)
    off = scale.abs() * (off * sums + (k + 16) * u * (share * sums + expected))
    zeros = torch.zeros(logits.shape, dtype=torch.float64, requires_grad=True)
    up = F.interpolate(zeros, size, mode="bilinear", align_corners=align_corners)
    truth, off, terms = (
        torch.autograd.grad(up, zeros, g, retain_graph=True)[0] for g in (exact, off, exact.abs() + off)
    )
    steps = interpolation_steps(logits.shape[2:]) + target[0].numel()
    assert ours[1].dtype == logits.dtype
    assert_within(ours[1], truth, off + steps * (u * spread_map(terms) + least(logits.dtype)))


# ---- counts ------------------------------------------------------------------------------------------------------


@holds_for_all
def test_confusion_matrix(draw: Draw) -> None:
    integers = [torch.uint8, torch.int16, torch.int32, torch.int64]
    k, ignore = draw.choice([1, 2, 3, 19, 150]), draw.choice([255, 0, 1, -1])
    shape = draw.choice([(), (0,), (7,), (2, 3), (2, 3, 5), (1, 2, 3, 4)])
    dtypes = draw.choice(integers), draw.choice(integers)
    generator = torch.Generator().manual_seed(draw.integer(0, 999))
    prediction, target = (torch.randint(0, k, shape, generator=generator) for _ in range(2))
    if ignore >= 0 or dtypes[1] != torch.uint8:
        target[torch.rand(shape, generator=generator) < 0.2] = ignore
    prediction, target = (draw.place(t.to(d)) for t, d in zip((prediction, target), dtypes, strict=True))
    out = torch.randint(0, 9, (k, k), generator=generator) if draw.flag() else None
    expected = reference.confusion_matrix(prediction, target, k, ignore, None if out is None else out.clone())
    (ours,) = draw.compute(
        lambda: [ops.confusion_matrix(prediction, target, k, ignore, None if out is None else out.clone())]
    )
    assert ours.dtype == torch.int64
    assert torch.equal(ours, expected)
