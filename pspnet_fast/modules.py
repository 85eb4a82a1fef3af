"""Modules around the operators."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedPPM(nn.Module):
    """Pyramid pooling module (first version in plain torch; the kernels come under the same interface)."""

    def __init__(self, in_channels: int, reduction_channels: int | None = None, bins=(1, 2, 3, 6), align_corners=True,
                 concat="input_first", norm_layer=nn.BatchNorm2d, activation=nn.ReLU) -> None:
        super().__init__()
        r = reduction_channels or in_channels // len(bins)
        self.bins, self.align_corners = bins, align_corners
        self.features = nn.ModuleList(
            nn.Sequential(nn.Identity(), nn.Conv2d(in_channels, r, 1, bias=False), norm_layer(r), activation())
            for _ in bins
        )

    def forward(self, input: Tensor) -> Tensor:
        size = input.shape[-2:]
        levels = []
        for b, f in zip(self.bins, self.features, strict=True):
            bn = f[2]
            pooled = f[1](F.adaptive_avg_pool2d(input, b))
            if bn.training and pooled.numel() == pooled.shape[1]:
                pooled = F.batch_norm(pooled, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
            else:
                pooled = bn(pooled)
            levels.append(F.interpolate(f[3](pooled), size, mode="bilinear", align_corners=self.align_corners))
        return torch.cat([input, *levels], 1)
