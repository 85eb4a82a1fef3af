"""What the package replaces, of plain torch layers: the baseline of speed, and the truth in tests."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast import FusedPPM


class StockPPM(nn.Module):
    """FusedPPM's docstring's "equivalent to", on a copy of its parameters."""

    def __init__(self, fused: FusedPPM) -> None:
        super().__init__()
        self.features, self.bins = copy.deepcopy(fused.features), fused.bins
        self.align_corners, self.concat = fused.align_corners, fused.concat

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + levels * R, H, W)."""
        size = x.shape[2:]
        maps = [f(F.adaptive_avg_pool2d(x, b)) for f, b in zip(self.features, self.bins, strict=True)]
        maps = [F.interpolate(m, size, mode="bilinear", align_corners=self.align_corners) for m in maps]
        return torch.cat([x, *maps] if self.concat == "input_first" else [*maps, x], 1)


class StockUpsampleConcat(nn.Module):
    """What FusedUpsampleConcat is, of the same layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (N, C_l, h_l, w_l), the first the largest -> (N, O, h_0, w_0)."""
        size = maps[0].shape[2:]
        return self.layers(torch.cat([maps[0], *(F.interpolate(z, size, mode="bilinear") for z in maps[1:])], 1))


class ConvModule(nn.Module):
    """As in mmcv: convolution, norm (named `bn`) and activation, called in this order."""

    def __init__(self, channels: int, out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(self.conv(x)))


class MMPPM(nn.ModuleList):
    """As in mmsegmentation: a list of branches with a forward, which gives the list of upsampled maps."""

    def __init__(self, pool_scales: Sequence[int], channels: int, out: int, align_corners: bool) -> None:
        super().__init__([nn.Sequential(nn.AdaptiveAvgPool2d(b), ConvModule(channels, out, 1)) for b in pool_scales])
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.interpolate(m(x), x.shape[2:], mode="bilinear", align_corners=self.align_corners) for m in self]


def upsampled_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The loss (mean over the pixels that are not 255) of logits (N, K, h, w) with upsampled logits in memory."""
    values = F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(values, target, ignore_index=255)
