"""fuse on the heads of other packages that convolve large upsampled maps, in the structures that they have there."""

import copy

import pytest
import torch
from foreign import assert_same, run
from foreign_upsampling import MODELS, NearestUnet, UNet
from torch import Tensor, nn

from pspnet_fast import fuse, ops
from pspnet_fast.fusion import convolution

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")
NAMES = [model.__name__ for model in MODELS]


def make(model: type[nn.Module], size: tuple[int, int] = (24, 16)) -> tuple[nn.Module, Tensor]:
    stock = model().double()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return stock, torch.randn(2, 8, *size, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_outputs_and_all_gradients(model, training):
    stock, x = make(model)
    fused, report = fuse(copy.deepcopy(stock), example=x, return_report=True)
    assert sorted(c.module for c in report.convolutions) == sorted(MODELS[model][0])
    stock.train(training), fused.train(training)
    assert_same(run(fused, x), run(stock, x))
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", [m for m in MODELS if MODELS[m][1]], ids=lambda m: m.__name__)
def test_found_without_an_example(model, monkeypatch):
    stock, x = make(model)
    fused, taken, low = fuse(copy.deepcopy(stock)).eval(), [], ops.pyramid_context_
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: taken.append(a[2]) or low(*a, **k))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock.eval()(x), rtol=1e-10, atol=1e-10)
    passes = len(MODELS[model][0]) + (model is NearestUnet)  # one for each way of upsampling
    assert len(taken) == passes


def test_nearest_at_sizes_where_rounding_decides(monkeypatch):
    """Scales that are no fraction by a power of two stay with torch."""
    stock, x = make(NearestUnet, (24, 24))
    blocks = stock.blocks
    fused, taken, low = fuse(copy.deepcopy(blocks), modules=["0"]), [], ops.pyramid_context_
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: taken.append(a[2]) or low(*a, **k))
    for source, size, count in [
        ((2, 3), (164, 6), 0),
        ((2, 3), (8, 12), 1),
        ((4, 6), (6, 12), 0),
        ((3, 4), (5, 8), 0),
        ((3, 4), (4, 8), 1),
    ]:
        taken.clear()
        map, skip = torch.randn(1, 8, *source, dtype=x.dtype), torch.randn(1, 7, *size, dtype=x.dtype)
        torch.testing.assert_close(fused[0](map, skip), blocks[0](map, skip), rtol=1e-10, atol=1e-10)
        assert len(taken) == count


def test_maps_that_are_padded_are_computed():
    """Of an odd size, which no upsampling by 2 gives."""
    stock, x = make(UNet, (25, 19))
    fused = fuse(copy.deepcopy(stock))
    assert_same(run(fused, x), run(stock, x))
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), stock.eval()(x), rtol=1e-10, atol=1e-10)


def test_norm_and_activation_where_no_map_gains(monkeypatch):
    """Large maps of few channels under a 3x3 kernel stay with torch, and so does what follows the convolution."""
    monkeypatch.setattr(convolution, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(convolution, "FEW_CELLS", 1)
    stock, x = make(UNet)
    fused = fuse(copy.deepcopy(stock), modules=["up1", "up2", "up3"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock.eval()(x), rtol=1e-10, atol=1e-10)
