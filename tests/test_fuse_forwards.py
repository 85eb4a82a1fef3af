"""Forwards written in any way run fused as they stand."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from foreign import PPM
from fused_pair import Head, check, pair, x
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")


class Changed(Head):
    """Something between the pyramid and the bottleneck."""

    change: Callable[[nn.Module, Tensor, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.cls(self.change(x, self.ppm(x)))


def write_in_place(self, x, y):
    x.mul_(2)
    return y


def write_into_view(self, x, y):
    x[:, :4].zero_()
    return y


def write_into_data(self, x, y):
    x.data.mul_(2)
    return y


def write_as_out(self, x, y):
    with torch.no_grad():
        torch.add(x.detach(), 1, out=x.detach())
    return y


def write_several(self, x, y):
    torch._foreach_mul_([x.detach()], 2.0)
    return y


def write_result(self, x, y):
    y.mul_(2)
    return y


def write_part_of_result(self, x, y):
    y[:, 9:11] = 3.0
    return y


def keep(self, x, y):
    self.last = y
    return y


def own_function(self, x, y):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    return Double.apply(y)


BETWEEN = {
    "x changed": write_in_place,
    "part of x changed": write_into_view,
    "data of x changed": write_into_data,
    "x as out": write_as_out,
    "x by foreach": write_several,
    "result changed": write_result,
    "part of the result changed": write_part_of_result,
    "kept": keep,
    "twice": lambda self, x, y: torch.cat([y[:, :8], y[:, 8:]], 1) + y,
    "method": lambda self, x, y: y.relu(),
    "contiguous": lambda self, x, y: y.contiguous(),
    "cast": lambda self, x, y: y.float().double(),
    "shape": lambda self, x, y: F.pad(y, (1, y.shape[3] % 2, 1, y.size(2) % 2)),
    "dropout": lambda self, x, y: F.dropout2d(y, 0.5, self.training),
    "own function": own_function,
    "numpy": lambda self, x, y: y * float(y.detach().numpy().mean()),
    "detach": lambda self, x, y: y.detach() + x.mean(),
    "hook on the tensor": lambda self, x, y: y.register_hook(lambda g: g * 2) and y if y.requires_grad else y,
    "iteration": lambda self, x, y: torch.stack(list(y)),
    "no grad": lambda self, x, y: self.frozen(x) + x.mean(),
    "einsum": lambda self, x, y: torch.einsum("nchw,c->nchw", y, torch.arange(16.0, dtype=y.dtype)),
    "deep copy": lambda self, x, y: copy.deepcopy(y.detach()) + y,
    "levels only": lambda self, x, y: torch.cat([y[:, 8:]] * 2, 1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_between_the_pyramid_and_the_bottleneck(name):
    class Model(Changed):
        change = BETWEEN[name]

        def frozen(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.ppm(x)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())  # which some write to

    stock, fused = pair(Model)
    if name in ("x changed", "part of x changed", "x as out", "x by foreach"):
        with torch.no_grad():  # its poolings need x for their gradients
            for training in (True, False):
                stock.train(training), fused.train(training)
                torch.testing.assert_close(fused(x()), stock(x()), rtol=1e-10, atol=1e-10)
    else:
        check(stock, fused)
    if name == "kept":
        torch.testing.assert_close(fused.last.sum(), stock.last.sum())


class Written(nn.Module):
    """Forwards as other code bases write them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        bins = (6, 3, 2, 1) if how == "fixed size" else (1, 2, 3, 6)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), nn.Conv2d(8, 2, 1, bias=False), nn.ReLU()) for b in bins
        )
        self.bottleneck = nn.Sequential(nn.Conv2d(16, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        size = (13, 9) if self.how == "fixed size" else tuple(x.shape[2:])
        corners = self.how != "not aligned"
        if self.how == "functions":
            levels = [stage[1:](F.adaptive_avg_pool2d(x, stage[0].output_size)) for stage in self.stages]
        else:
            levels = [stage(x) for stage in self.stages]
        if self.how == "nearest":
            maps = [F.interpolate(z, size) for z in levels]
        elif self.how == "upsample module":
            maps = [nn.Upsample(size, mode="bilinear", align_corners=True)(z) for z in levels]
        elif self.how == "mixed":
            maps = [F.interpolate(z, size, mode="bilinear", align_corners=i % 2 == 0) for i, z in enumerate(levels)]
        else:
            maps = [F.interpolate(z, size, mode="bilinear", align_corners=corners) for z in levels]
        if self.how == "reversed":
            maps = maps[::-1]
        if self.how == "nested":
            return self.bottleneck(torch.cat([torch.cat([x, *maps[:2]], dim=1), torch.cat(maps[2:], dim=-3)], 1))
        if self.how == "two maps":
            return self.bottleneck(torch.concat([x[:, :4], maps[0], maps[1], x[:, 4:], *maps[2:]], dim=1))
        if self.how == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        return self.bottleneck(torch.cat([*maps, x] if self.how == "last" else [x, *maps], 1))


@pytest.mark.parametrize(
    "how",
    ["first", "last", "reversed", "fixed size", "functions", "not aligned", "nearest", "upsample module", "mixed",
     "nested", "two maps", "channels last"],
)  # fmt: skip
def test_ways_to_write_a_pyramid(how):
    check(*pair(lambda: Written(how)))


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(16, 3, 1),
        nn.Conv2d(16, 3, (3, 5), padding=(1, 2)),
        nn.Conv2d(16, 3, 3, padding="same", dilation=2),
        nn.Conv2d(16, 3, 3),  # unpadded
        nn.Conv2d(16, 3, 2),
        nn.Conv2d(16, 3, 3, padding=1, stride=2),
        nn.Conv2d(16, 4, 3, padding=1, groups=2),
        nn.Conv2d(16, 3, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(16, 3, 3),
    ],
    ids=str,
)
def test_convolutions(convolution):
    check(*pair(lambda: nn.Sequential(PPM(8, 2), convolution)))
