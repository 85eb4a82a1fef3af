"""fuse reads a map that a pyramid pools at several sizes once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pspnet_fast import fuse, ops
from pspnet_fast.fusion import pools


class Pyramid(nn.Module):
    """Levels of layers, which `between` may disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Conv2d(5, 3, 1), nn.ReLU()) for size in (1, 2, (3, 2), 6)
        )
        self.bottleneck = nn.Conv2d(5 + 4 * 3, 4, 3, padding=1)
        self.between = lambda x, level: None

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        maps = [x]
        for number, level in enumerate(self.levels):
            maps.append(F.interpolate(level(x), x.shape[2:], mode="bilinear", align_corners=True))
            self.between(x, number)
        return self.bottleneck(torch.cat(maps, 1))


@pytest.fixture
def calls(monkeypatch):
    """The levels of every call of pyramid_pool."""
    monkeypatch.setattr(pools, "LEAST_ELEMENTS", 0)
    taken, pyramid_pool = [], ops.pyramid_pool
    monkeypatch.setattr(ops, "pyramid_pool", lambda x, bins: taken.append(bins) or pyramid_pool(x, bins))
    return taken


def pair() -> tuple[Pyramid, Pyramid]:
    stock = Pyramid().double()
    return stock, fuse(copy.deepcopy(stock), modules=[""])


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    output.sin().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


X = torch.randn(2, 5, 13, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_read(calls, layout):
    stock, fused = pair()
    x = X.contiguous(memory_format=layout)
    first = run(fused, x)
    assert calls == [((1, 1), (2, 2), (3, 2), (6, 6))]
    assert_same(first, run(stock, x))
    assert all(torch.equal(a, b) for a, b in zip(run(fused, x), first, strict=True))  # bits, of a later forward too
    strides = []
    for model in (stock, fused):
        for level in model.levels:
            level[1].register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
        model(x)
    assert strides[:4] == strides[4:]


def test_layers_count_as_they_are_now(calls):
    stock, fused = pair()
    run(fused, X)
    for model in (stock, fused):
        model.levels[1][0] = nn.AdaptiveAvgPool2d((5, None))  # which depends on the map: left to torch
        model.levels[2][0].output_size = 4
    calls.clear()
    assert_same(run(fused, X), run(stock, X))
    assert calls == [((1, 1), (4, 4), (6, 6))]


def test_a_map_that_changes_is_pooled_again(calls):
    def between(x: Tensor, level: int) -> None:
        if level == 1:
            x.mul_(2)

    stock, fused = pair()
    stock.between = fused.between = between
    with torch.no_grad():
        assert_same([fused(X)], [stock(X)])
    assert len(calls) == 2


def test_pooled_maps_may_be_written_to(calls):
    class Doubled(nn.AdaptiveAvgPool2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).mul_(2)

    stock, fused = pair()
    for model in (stock, fused):
        model.levels[1][0] = Doubled(2)
    assert_same(run(fused, X), run(stock, X))
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints(calls, whole, reentrant):
    """Of the model, and of a level of it, which is pooled by itself then."""
    stock, fused = pair()
    expected = run(stock, X)
    if whole:
        again = nn.Sequential(fused)
        again.forward = lambda x: checkpoint(fused, x, use_reentrant=reentrant)
    else:
        again, level = fused, fused.levels[2].forward
        fused.levels[2].forward = lambda x: checkpoint(level, x, use_reentrant=reentrant)
    assert_same(run(again, X), expected)
    assert calls


def test_autocast_and_small_maps_are_left_to_torch(calls, monkeypatch):
    fused = pair()[1].float()
    with torch.autocast("cpu", torch.bfloat16):
        fused(X.float())
    monkeypatch.setattr(pools, "LEAST_ELEMENTS", X.numel() + 1)
    fused(X.float())
    assert not calls
