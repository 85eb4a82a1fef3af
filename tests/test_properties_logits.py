"""The operators of logits and classes on random shapes, strides, dtypes and values, extreme ones too."""

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
    kinds,
    least,
    magnitude,
    spread_map,
    unit,
)
from torch import Tensor

from pspnet_fast import ops, reference


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
