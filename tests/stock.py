"""The pyramid pooling module of plain torch layers: the truth in tests, the baseline of speed."""

import copy

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
        size = x.shape[2:]
        maps = [f(F.adaptive_avg_pool2d(x, b)) for f, b in zip(self.features, self.bins, strict=True)]
        maps = [F.interpolate(m, size, mode="bilinear", align_corners=self.align_corners) for m in maps]
        return torch.cat([x, *maps] if self.concat == "input_first" else [*maps, x], 1)
