"""fuse on random pyramids: whatever their forward does, and is done to them, is what the model alone computes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign import assert_same, run
from properties import Draw, holds_for_all
from torch import Tensor, nn

from pspnet_fast import fuse

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")


class Pyramid(nn.Module):
    """Parts, dense and upsampled ones in any order, each with a detour or none, concatenated and convolved."""

    def __init__(self, parts: list[dict[str, Any]], bottleneck: dict[str, Any], detours: list[str]) -> None:
        super().__init__()
        self.parts, self.detours = parts, detours
        self.branches = nn.ModuleList(
            nn.Sequential(*[nn.AdaptiveAvgPool2d(p["bins"])] * (p["bins"] is not None), *_layers(p)) for p in parts
        )
        kh, kw = bottleneck["kernel"]
        dilation = bottleneck["dilation"]
        padding = (kh // 2 * dilation, kw // 2 * dilation)
        channels = CHANNELS + sum(p["out"] for p in parts)
        self.conv = nn.Conv2d(channels, 5, (kh, kw), padding=padding, dilation=dilation, bias=bottleneck["bias"])
        self.rest = nn.Sequential(*_norm(bottleneck["norm"], 5), nn.ReLU(inplace=True), nn.Conv2d(5, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1  # which may be changed in place
        maps = []
        for part, branch in zip(self.parts, self.branches, strict=True):
            z = branch(x)
            if part["bins"] is not None:
                y = F.interpolate(z, x.shape[2:], mode="bilinear", align_corners=part["align_corners"])
                maps.append(DETOURS[part["detour"]](y, z))
            else:
                maps.append(z)
        maps.insert(len(maps) // 2, x)
        if "nested" in self.detours:
            maps = [torch.cat(maps[:2], 1), *maps[2:]]
        y = torch.cat(maps, dim=1)
        if "input changed" in self.detours:
            x.mul_(0.5)
        if "changed" in self.detours:
            y.mul_(1.5)
        if "channels" in self.detours:
            y = torch.cat([y[:, 1:], y[:, :1]], 1)
        if "added to itself" in self.detours:
            y = y + y.flip(1)
        if "twice" in self.detours:
            y = self.conv(y).tanh() + self.conv(y)
        elif "functional" in self.detours:
            y = F.conv2d(y, self.conv.weight * 2, self.conv.bias, 1, self.conv.padding, self.conv.dilation)
        else:
            y = self.conv(y)
        return self.rest(y)


CHANNELS = 4
DETOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda y, z: y,
    "scaled": lambda y, z: y * 2,
    "source changed": lambda y, z: z.mul_(2) is not None and y,
    "changed": lambda y, z: y.add_(1),
    "a part changed": lambda y, z: y[:, :1].zero_() is not None and y,
    "activation": lambda y, z: F.relu(y, inplace=True),
    "detached": lambda y, z: y.detach(),
    "permuted": lambda y, z: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "mean": lambda y, z: y - y.mean((2, 3), keepdim=True),
    "upsampled again": lambda y, z: F.interpolate(y, y.shape[2:], mode="bilinear", align_corners=True),
    "of its data": lambda y, z: y.data,
    "cloned": lambda y, z: y.clone(),
}


def _norm(kind: str, channels: int) -> list[nn.Module]:
    make = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(1, c), "none": None}[kind]
    return [make(channels)] if make else []


def _layers(part: dict[str, Any]) -> list[nn.Module]:
    activation: list[nn.Module] = {"relu": [nn.ReLU(inplace=True)], "gelu": [nn.GELU()], "none": []}[part["activation"]]
    return [nn.Conv2d(CHANNELS, part["out"], 1, bias=part["bias"]), *_norm(part["norm"], part["out"]), *activation]


CHANGES: dict[str, Callable[[Pyramid], Any]] = {
    "nothing": lambda m: None,
    "weights by .data": lambda m: m.conv.weight.data.mul_(0.5),
    "weights": lambda m: m.load_state_dict(
        {k: v * 0.9 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    ),
    "frozen": lambda m: m.conv.weight.requires_grad_(False),
    "hook": lambda m: m.conv.register_forward_hook(lambda m, i, o: o * 2),
    "other bottleneck": lambda m: setattr(m, "conv", nn.Sequential(copy.deepcopy(m.conv), nn.Hardtanh())),
    "dilation": lambda m: setattr(m.conv, "dilation", (1, 1)) or setattr(m.conv, "padding", "same"),
    "other bins": lambda m: [setattr(p, "output_size", 2) for p in m.modules() if isinstance(p, nn.AdaptiveAvgPool2d)],
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "frozen norms": lambda m: [p.eval() for p in m.modules() if isinstance(p, nn.BatchNorm2d)],
}


def part(draw: Draw, dense: bool) -> dict[str, Any]:
    bins = None if dense else draw.choice([1, 2, 3, 6, (1, 4), (3, 2), (None, 2)])
    return {
        "bins": bins,
        "out": draw.integer(1, 3),
        "bias": draw.flag(),
        "norm": draw.choice(["batch", "none", "group"]),
        "activation": draw.choice(["relu", "none", "gelu"]),
        "align_corners": draw.choice([True, False, None]),
        "detour": draw.choice(["none", "none", "none", *DETOURS]),
    }


@holds_for_all
def test_fuse(draw: Draw) -> None:
    parts = [part(draw, draw.choice([False, False, True])) for _ in range(draw.integer(1, 4))]
    bottleneck = {
        "kernel": draw.choice([(1, 1), (3, 3), (5, 5), (1, 3), (3, 1)]),
        "dilation": draw.integer(1, 3),
        "bias": draw.flag(),
        "norm": draw.choice(["batch", "none", "group"]),
    }
    names = ["input changed", "changed", "nested", "channels", "added to itself", "twice", "functional"]
    detours = [name for name in names if draw.integer(0, 5) == 5]
    torch.manual_seed(draw.integer(0, 99))
    x = torch.randn(draw.integer(2, 3), CHANNELS, draw.integer(3, 9), draw.integer(3, 9), dtype=torch.float64)
    if draw.flag():
        x = x.contiguous(memory_format=torch.channels_last)
    stock = Pyramid(parts, bottleneck, detours).double()
    fused = fuse(copy.deepcopy(stock), modules=[""])
    for change in ("nothing", draw.choice([*CHANGES])):
        CHANGES[change](stock), CHANGES[change](fused)
        for training in (True, False):
            stock.train(training), fused.train(training)
            if change == "frozen norms":
                CHANGES[change](stock), CHANGES[change](fused)
            expected, ours = outcome(stock, x), outcome(fused, x)
            if isinstance(expected, str):  # values that backward needs were changed
                assert ours == expected
                return
            assert not isinstance(ours, str), ours
            assert_same(ours, expected, TOLERANCE)
        with torch.no_grad():
            assert_same({"output": fused(x)}, {"output": stock(x)}, TOLERANCE)


# of each result's greatest element; norms over few values divide by small deviations
TOLERANCE = 1e5 * torch.finfo(torch.float64).eps


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor] | str:
    """What foreign.run returns, or the start of what backward raises."""
    try:
        return run(model, x)
    except RuntimeError as error:
        return str(error).partition(":")[0]
