"""The modules on random shapes, strides, dtypes and values against their plain form in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from properties import FINITE, Draw, accumulator, assert_within, holds_for_all, interpolation_steps, unit
from torch import Tensor, nn

from pspnet_fast import FusedPPM, FusedPSPHead, UpsampleCrossEntropyLoss, ops

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")

WIDE = [torch.float64, torch.float64, torch.float32]  # norms in training divide by deviations: mostly in float64


def plain_ppm(ppm: FusedPPM, x: Tensor) -> Tensor:
    levels = []
    for bins, branch in zip(ppm.levels, ppm.features, strict=True):
        z = branch[1:](F.adaptive_avg_pool2d(x, bins))
        levels.append(F.interpolate(z, x.shape[2:], mode="bilinear", align_corners=ppm.align_corners))
    return torch.cat([x, *levels] if ppm.concat == "input_first" else [*levels, x], 1)


def one_group(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, channels)


def pyramid(draw: Draw) -> FusedPPM:
    norm = draw.choice([nn.BatchNorm2d, nn.Identity, one_group])
    activation = draw.choice([nn.ReLU, nn.Identity, nn.GELU])
    concat = draw.choice(["input_first", "input_last"])
    sizes = draw.integer(1, 9), draw.integer(2 if norm is one_group else 1, 4)  # torch refuses groups of one number
    ppm = FusedPPM(*sizes, draw.bins(3, 4), draw.flag(), concat, norm_layer=norm, activation=activation)
    for module in ppm.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias), nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return ppm


def assert_same_module(draw: Draw, module: nn.Module, plain: Callable[[nn.Module, Tensor], Tensor], steps: int) -> None:
    """Result, gradients and statistics, in training and evaluation, and the result without gradients.

    Errors grow by what norms divide by: the tolerance is relative to the greatest element, times AMPLIFIED.
    """
    dtype = draw.choice(WIDE)
    module.to(dtype).train(draw.flag())
    few = module.training and any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    ppm = next(m for m in module.modules() if isinstance(m, FusedPPM))
    x = draw.tensor((draw.integer(2 if few else 0, 3), ppm.in_channels, *draw.size(8)), dtype, ["normal", "integers"])
    exact = copy.deepcopy(module).double()
    state = copy.deepcopy(module.state_dict())

    def run(module: nn.Module, function: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> list[Tensor]:
        module.zero_grad()
        leaf = x.detach().requires_grad_()
        y = function(module, leaf)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype))
        return [y, leaf.grad, *[p.grad for p in module.parameters()], *module.buffers()]

    def ours() -> list[Tensor]:
        module.load_state_dict(state)
        return run(module, lambda m, x: m(x), x)

    results = draw.compute(ours)
    for result, truth in zip(results, run(exact, plain, x.double()), strict=True):
        assert result.dtype in (dtype, torch.int64)
        if truth.numel():
            scale = truth.detach().abs().max().clamp(min=1)
            assert_within(
                result, truth.detach().double(), scale.double().expand(truth.shape) * steps * AMPLIFIED * unit(dtype)
            )
    if not few:
        with torch.no_grad():
            (result,) = draw.compute(lambda: [module(x)])
            truth = plain(exact, x.double())
            slack = (truth.abs().amax() if truth.numel() else truth.sum()).clamp(min=1) * steps * unit(dtype) * 16
            assert_within(result, truth, slack.expand(truth.shape))


AMPLIFIED = 1e5  # 1 / eps of batch norm: the square of what it multiplies by at most


@holds_for_all
def test_fused_ppm(draw: Draw) -> None:
    torch.manual_seed(draw.integer(0, 99))
    assert_same_module(draw, pyramid(draw), plain_ppm, 64)


@holds_for_all
def test_fused_psp_head(draw: Draw) -> None:
    torch.manual_seed(draw.integer(0, 99))
    ppm = pyramid(draw)
    kernel, dilation = draw.choice([(1, 1), (3, 3), (1, 5)]), draw.integer(1, 3)
    padding = tuple(k // 2 * dilation for k in kernel)
    conv = nn.Conv2d(ppm.out_channels, 5, kernel, padding=padding, dilation=dilation, bias=draw.flag())
    head = FusedPSPHead(ppm, conv, draw.choice([None, nn.BatchNorm2d(5)]), draw.choice([None, nn.ReLU()]))
    assert_same_module(draw, head, lambda m, x: m.bottleneck(plain_ppm(m.ppm, x)), 256)


@holds_for_all
def test_upsample_cross_entropy_loss(draw: Draw) -> None:
    """Of hard pixels: those of the operator's losses that the definition picks; it and its gradient."""
    dtype, source, size = draw.choice([torch.float32, torch.float64, torch.bfloat16]), draw.size(5), draw.size(9)
    n, k = draw.integer(0, 2), draw.integer(1, 5)
    logits = draw.tensor((n, k, *source), dtype, FINITE)
    generator = torch.Generator().manual_seed(draw.integer(0, 999))
    target = torch.randint(0, k, (n, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < draw.choice([0.0, 0.4, 1.0])] = 255
    target = draw.place(target)
    threshold, min_kept, reduction = (
        draw.choice([0.01, 0.5, 1.0]),
        draw.choice([0, 1, 5, 1000]),
        draw.choice(["mean", "sum"]),
    )
    settings = {"align_corners": draw.flag(), "label_smoothing": draw.choice([0.0, 0.2])}
    settings["weight"] = torch.rand(k, generator=generator) if draw.flag() else None
    loss = UpsampleCrossEntropyLoss(ohem=True, threshold=threshold, min_kept=min_kept, reduction=reduction, **settings)

    def run() -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        value = loss(leaf, target)
        return [value, *torch.autograd.grad(value, leaf)]

    value, gradient = draw.compute(run)

    leaf = logits.detach().requires_grad_()
    losses = ops.upsample_cross_entropy(leaf, target, reduction="none", **settings)
    valid = sorted(losses.detach()[target != 255].double().tolist(), reverse=True)
    bound = -torch.tensor(threshold, dtype=losses.dtype).double().log().item()
    if min_kept * n:
        few = valid[min_kept * n - 1] if min_kept * n <= len(valid) else -1.0
        bound = min(bound, few)
    near = 4 * unit(dtype) * max(1.0, abs(bound))
    if any(abs(v - bound) <= near for v in valid) and bound not in valid:
        return  # which side of the threshold, a rounding decides
    kept = (target != 255) & (losses.detach().double() >= bound)
    truth = torch.where(kept, losses.double(), 0).sum() / (kept.sum().clamp(min=1) if reduction == "mean" else 1)
    (expected,) = torch.autograd.grad(truth, leaf)
    steps = interpolation_steps(source) + target.numel()
    assert value.dtype == accumulator(dtype)
    assert_within(value, truth.detach(), steps * unit(dtype) * truth.detach().abs())
    slack = steps * unit(dtype) + torch.finfo(dtype).eps
    assert_within(
        gradient,
        expected.double(),
        slack * expected.double().abs().amax().expand(expected.shape) if n else expected.double(),
    )
