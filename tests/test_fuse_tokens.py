"""fuse on heads that project tokens, upsample and convolve, as SegFormer's: by one linear map instead of two."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast import fuse, ops
from pspnet_fast.fusion import convolution

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")
DOUBLE = torch.float64
CHANNELS, SIZES = (3, 4, 5, 7), ((12, 13), (6, 7), (4, 3), (2, 2))


class TokenHead(nn.Module):
    """Transformers' form of SegFormer's head; `way` is how its tokens become a map."""

    def __init__(self, way: str = "permute", width: int = 16, kernel: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.way = way
        self.linear = nn.ModuleList(nn.Linear(c, width, bias=bias) for c in CHANNELS)
        self.fuse = nn.Conv2d(width * len(CHANNELS), 6, kernel, padding=kernel // 2, bias=not bias)
        self.norm = nn.BatchNorm2d(6)
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size, upsampled = maps[0].shape[2:], []
        for x, linear in zip(maps, self.linear, strict=True):
            n, _, h, w = x.shape
            tokens = linear(x.flatten(2).transpose(1, 2))
            if self.way == "permute":
                y = tokens.permute(0, 2, 1).reshape(n, -1, h, w)
            elif self.way == "contiguous":
                y = tokens.transpose(1, 2).contiguous().view(n, tokens.size(2), h, w)
            elif self.way == "activation":
                y = F.relu(tokens).transpose(-1, -2).reshape(n, -1, h, w)
            else:
                y = tokens.transpose(2, 1).reshape([n, -1, h, w]) + 1
            upsampled.append(F.interpolate(y, size=size, mode="bilinear", align_corners=self.way == "contiguous"))
        return F.relu(self.norm(self.fuse(torch.cat(upsampled[::-1], dim=1))))


def outcome(module: nn.Module, maps: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """The result, and with `grad` the gradients of maps and parameters."""
    leaves = [m.clone().requires_grad_(grad is not None) for m in maps]
    if grad is None:
        with torch.no_grad():
            return [module(leaves)]
    module.zero_grad()
    output = module(leaves)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "kernel"), [(16, 1), (5, 1), (16, 3)])
@pytest.mark.parametrize("way", ["permute", "contiguous", "activation", "addition"])
def test_equals_the_head_alone(way, width, kernel, bias, mode):
    """Of width 5, some levels are not worth merging."""
    stock = TokenHead(way, width, kernel, bias).to(DOUBLE).train(mode == "training")
    fused = fuse(copy.deepcopy(stock), modules=[""])
    maps = [torch.randn(2, c, *size, dtype=DOUBLE) for c, size in zip(CHANNELS, SIZES, strict=True)]
    grad = None if mode == "inference" else torch.randn(2, 6, *SIZES[0], dtype=DOUBLE)
    expected, ours = outcome(stock, maps, grad), outcome(fused, maps, grad)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert ours[0].stride() == expected[0].stride()


def test_maps_that_change_their_shape_but_not_their_size():
    """As many cells as pixels, which are interpolated all the same; beside levels that are merged."""
    stock = TokenHead(width=64).to(DOUBLE).eval()
    fused = fuse(copy.deepcopy(stock), modules=[""])
    sizes = ((12, 15), (15, 12), (9, 20), (3, 3))
    maps = [torch.randn(2, c, *size, dtype=DOUBLE) for c, size in zip(CHANNELS, sizes, strict=True)]
    for grad in (None, torch.randn(2, 6, *sizes[0], dtype=DOUBLE)):
        for a, b in zip(outcome(fused, maps, grad), outcome(stock, maps, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_image_has_the_strides_of_channels_last():
    """So that the next convolution takes it as it is; torch's products of one image leave others."""
    model = fuse(TokenHead().eval())
    with torch.no_grad():
        output = model([torch.randn(1, c, *size) for c, size in zip(CHANNELS, SIZES, strict=True)])
    assert output.stride() == (6 * 12 * 13, 1, 13 * 6, 6)


def test_runs_at_low_resolution(monkeypatch):
    model, shapes, taken = TokenHead().eval(), [], []
    fuse(model)
    maps = [torch.randn(1, c, *size) for c, size in zip(CHANNELS, SIZES, strict=True)]
    merged, context = convolution._merged, ops.pyramid_context_
    monkeypatch.setattr(convolution, "_merged", lambda *a, **k: shapes.append(a[1].shape) or merged(*a, **k))
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: taken.append((a[2], k["relu"])) or context(*a, **k))
    with torch.no_grad():
        model(maps)
    assert [s[1] for s in shapes] == [5, 4, 3]  # the level of four cells is cheaper one linear map after the other
    assert taken == [(list(reversed(SIZES[1:])), True)]


def test_what_is_done_to_the_linear_layer_counts():
    stock = TokenHead().to(DOUBLE)
    fused = fuse(copy.deepcopy(stock), modules=[""])
    maps = [torch.randn(2, c, *size, dtype=DOUBLE) for c, size in zip(CHANNELS, SIZES, strict=True)]
    grad = torch.randn(2, 6, *SIZES[0], dtype=DOUBLE)

    def larger(module: nn.Conv2d, args: object) -> None:
        module.weight.data.mul_(1.5)

    for module in (stock, fused):
        module.linear[1].register_forward_hook(lambda _, args, output: output * 2)
        module.fuse.register_forward_pre_hook(larger)
        module.linear[2] = nn.Sequential(nn.Linear(5, 16), nn.Tanh()).to(DOUBLE)
    fused.linear[2].load_state_dict(stock.linear[2].state_dict())
    for a, b in zip(outcome(fused, maps, grad), outcome(stock, maps, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    stock = TokenHead(width=64).train(training)
    fused = fuse(copy.deepcopy(stock), modules=[""])
    maps = [torch.randn(2, c, *size) for c, size in zip(CHANNELS, SIZES, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = fused(maps), stock(maps)
    exact = copy.deepcopy(stock).double()([m.double() for m in maps])
    assert ours.dtype == expected.dtype
    assert (ours - exact).norm() <= 1.5 * (expected - exact).norm()


def test_what_is_written_to_in_between_counts():
    class Writes(TokenHead):
        def forward(self, maps: list[Tensor]) -> Tensor:
            tokens = self.linear[1](maps[1].flatten(2).transpose(1, 2))
            y = F.interpolate(tokens.permute(0, 2, 1).reshape(2, -1, *SIZES[1]), size=SIZES[0], mode="bilinear")
            before = F.conv2d(y, self.fuse.weight[:, :16])
            with torch.no_grad():
                self.linear[1].weight.mul_(3)
                maps[1].add_(1)
            return torch.cat([before, F.conv2d(torch.cat([y, y], 1), self.fuse.weight[:, :32])], 1)

    stock = Writes().to(DOUBLE)
    fused = fuse(copy.deepcopy(stock), modules=[""])
    maps = [torch.randn(2, c, *size, dtype=DOUBLE) for c, size in zip(CHANNELS, SIZES, strict=True)]
    with torch.no_grad():
        results = [module([m.clone() for m in maps]) for module in (fused, stock)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
