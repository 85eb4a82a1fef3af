"""A small head, the same fused, and the check that they compute the same."""

import copy
from collections.abc import Callable

import torch
from foreign import PPM, assert_same, run
from torch import Tensor, nn

from pspnet_fast import fuse
from pspnet_fast.fusion import Fused


class Head(nn.Module):
    """A pyramid, then a bottleneck and a classifier."""

    def __init__(self, ppm: nn.Module | None = None) -> None:
        super().__init__()
        self.ppm = ppm or PPM(8, 2)
        self.cls = nn.Sequential(
            nn.Conv2d(16, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cls(self.ppm(x))


def x(n: int = 3) -> Tensor:
    return torch.randn(n, 8, 13, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pair(build: Callable[[], nn.Module] = Head) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = build().double()
    fused = fuse(copy.deepcopy(stock))
    assert any(isinstance(m, Fused) for m in fused.modules())
    return stock, fused


def check(stock: nn.Module, fused: nn.Module) -> None:
    """Outputs, buffers and all gradients, in training and evaluation; outputs without gradients."""
    for training in (True, False):
        stock.train(training), fused.train(training)
        assert_same(run(fused, x()), run(stock, x()))
    with torch.no_grad():
        torch.testing.assert_close(fused(x()), stock(x()), rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x()), stock(x()), rtol=1e-10, atol=1e-10)
