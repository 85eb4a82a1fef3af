"""upsample_cross_entropy of logits that are infinite, huge or NaN: what float64 gives."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, make
from torch import Tensor

from pspnet_fast import UpsampleCrossEntropyLoss, ops

pytestmark = pytest.mark.usefixtures("poison")

EXTREMES = [-torch.inf, -3e38, -1e30, 1e30, 3e38, torch.inf, torch.nan]
K = 5


def both(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and the gradient of its sum."""
    leaf = logits.detach().requires_grad_()
    loss = function(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_with_weights_as_torch(device, dtype):
    """Of the target and of another class, in every reduction, with class weights (0 too), smoothing and ignored pixels.

    Without interpolation torch's own result in float64 is to be met: inf, NaN or the number, and its gradient.
    """
    target = torch.randint(0, K, (2, 6, 7))
    target[0, 0], target[1, 2, 3] = 255, 2
    target = target.to(device)
    weight = torch.tensor([0.5, 0.25, 1, 0, 0.75], device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cases = itertools.product(("none", "mean", "sum"), (0.0, 0.1, 1.0), (None, weight), (False, True), EXTREMES)
    for number, (reduction, smoothing, factors, everywhere, extreme) in enumerate(cases):
        if number % 4:
            continue  # a quarter of them holds all pairs
        logits = make((2, K, 6, 7), ("contiguous", "channels_last")[number // 4 % 2], dtype, device)
        if everywhere:  # one class switched off, or on
            logits[:, 2] = extreme
        else:
            logits[1, 2, 2, 3] = logits[0, 3, 4, 5] = logits[0, 1, 0, 0] = extreme  # the last one is ignored
        options = {"ignore_index": 255, "label_smoothing": smoothing, "reduction": reduction}

        def ours(z, options=options, factors=factors):
            return ops.upsample_cross_entropy(z, target, weight=factors, **options)

        def stock(z, options=options, factors=factors):
            return F.cross_entropy(z.double(), target, None if factors is None else factors.double(), **options)

        case = f"logit {extreme}, {reduction}, smoothing {smoothing}, {factors=}, {everywhere=}"
        (loss, gradient), (exact, exact_gradient) = both(ours, logits), both(stock, logits)
        torch.testing.assert_close(loss, exact.to(wide), equal_nan=True, msg=lambda m, case=case: f"{case}: {m}")
        ignored = (target == 255)[:, None].expand_as(logits)  # torch: NaN for every class if one is not finite
        results = gradient[~ignored], exact_gradient[~ignored]
        torch.testing.assert_close(*results, equal_nan=True, msg=lambda m, case=case: f"{case}: {m}")
        if not (logits.isnan() | logits.isposinf()).any():  # 1e30 is infinite in float16
            assert not gradient[ignored].any()


def exactly_upsampled(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """In float64; a logit of -infinity does not count where its weight is 0."""
    off = logits.double() == -torch.inf
    parts = [
        F.interpolate(part, size, mode="bilinear", align_corners=align_corners)
        for part in (logits.double().masked_fill(off, 0), off.double())
    ]
    return parts[0] + torch.zeros_like(parts[1]).masked_fill(parts[1] > 0, -torch.inf)


# exact scales: whether a weight is 0 is no matter of rounding
UPSAMPLED = [((1, 1), (5, 3), True), ((3, 5), (9, 17), True), ((4, 4), (8, 16), False), ((9, 5), (5, 5), True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "size", "align_corners"), UPSAMPLED)
def test_extreme_values_between_weights(device, shape, size, align_corners, dtype):
    """Random patterns of them, where several classes or all of them may be far below; the float64 result decides."""
    found = set()
    for seed in range(16):
        torch.manual_seed(seed)
        logits = torch.randn(2, 3, *shape)
        share = [0.02, 0.1, 0.3, 0.7][seed % 4]
        for value in (-torch.inf, -3e38, -1e30, -1e5):
            chosen = torch.rand(logits.shape) < share / 2
            logits[chosen] = value / (1 + torch.rand(int(chosen.sum())))  # no ties
        if seed % 8 == 7:
            logits[0, 1, 0, 0] = [torch.inf, torch.nan][seed // 8 % 2]
        logits = logits.to(device, dtype)
        target = torch.randint(0, 3, (2, *size))

        # On the CPU: torch's upsampling on a GPU makes NaN of a neighbour whose weight is 0 on an axis of equal sizes.
        values = exactly_upsampled(logits.cpu(), size, align_corners)

        def truth(change, values=values, target=target):
            values = values + F.interpolate(change, size, mode="bilinear", align_corners=align_corners)
            return F.cross_entropy(values, target, reduction="none")

        expected = both(truth, torch.zeros_like(logits, dtype=torch.float64, device="cpu"))
        there = target.to(device)
        ours = both(
            lambda z, t=there: ops.upsample_cross_entropy(z, t, align_corners=align_corners, reduction="none"), logits
        )
        ours = tuple(result.cpu() for result in ours)
        picked = values.gather(1, target[:, None])[:, 0]
        scale = torch.maximum(values.amax(1).abs(), picked.abs()).nan_to_num(0, 0, 0) + 1
        loss, exact = ours[0].double(), expected[0].to(dtype).double()
        assert torch.equal(loss.isnan(), exact.isnan())
        assert torch.equal(loss.isinf(), exact.isinf())
        finite = exact.isfinite()
        error = (loss - exact)[finite].abs() / scale[finite]
        assert error.numel() == 0 or error.max() < 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours[1], expected[1].to(dtype), rtol=1e-4, atol=1e-5, equal_nan=True)
        found |= {bool(exact.isnan().any()) and "nan", bool(exact.isinf().any()) and "inf", bool((exact > 1e29).any())}
    assert {"nan", "inf", True} <= found


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_class_switched_off_costs_others_nothing(device, layout, align_corners):
    """Loss and gradient are those without the class, also where F.interpolate gives NaN."""
    logits = make((2, 6, 5, 9), layout, torch.float32, device)
    logits[:, 3] = -torch.inf
    target = torch.randint(0, 5, (2, 17, 33), device=device)
    remaining = torch.tensor([0, 1, 2, 4, 5], device=device)
    options = {"align_corners": align_corners, "reduction": "none"}
    loss, gradient = both(lambda z: ops.upsample_cross_entropy(z, remaining[target], **options), logits)
    expected = both(lambda z: ops.upsample_cross_entropy(z, target, **options), logits[:, remaining])
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient[:, remaining], expected[1])
    assert not gradient[:, 3].any()


@pytest.mark.parametrize("extreme", [-torch.inf, -1e30, -3e38])
def test_hard_pixels_keep_extreme_losses(device, extreme):
    """Online hard example mining: such a pixel is the hardest, and its loss is seen."""
    logits, target = torch.randn(2, K, 6, 7, device=device), torch.zeros(2, 6, 7, dtype=torch.int64, device=device)
    logits[1, 0, 2, 3] = extreme
    for min_kept in (0, 1, 10):
        loss = UpsampleCrossEntropyLoss(ohem=True, threshold=1e-6, min_kept=min_kept, reduction="sum")
        value, gradient = both(lambda z: loss(z, target), logits)  # noqa: B023
        losses = F.cross_entropy(logits, target, reduction="none").flatten()
        torch.testing.assert_close(value, losses.sort().values[-max(1, 2 * min_kept) :].sum())
        assert gradient[1, 0, 2, 3] == -1
        assert gradient.isfinite().all()
