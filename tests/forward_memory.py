"""Peak memory of one forward pass of a pyramid pooling module, above what was there before it.

On the CPU it is the growth of the resident set of a fresh process, which sees the kernels' own scratch as well as
tensors. On a GPU it is the allocator's count.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pspnet_fast import FusedPPM, FusedPSPHead
from pspnet_fast.bench.memory import growth, in_child
from pspnet_fast.bench.stock import StockPPM


def forward_memory(
    implementation: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
    training: bool = False,
) -> int:
    """Bytes, those of the output included.

    Args:
        implementation: of the pyramid, "fused" or "stock"; of the pyramid with its bottleneck, "fused head" or "stock
            head"; "convolution": that of x alone in the bottleneck.
    """
    return in_child(_measure, implementation, tuple(shape), dtype, memory_format, device, training)


def make_module(implementation: str, channels: int) -> nn.Module:
    ppm, o = FusedPPM(channels), channels // 4
    conv = nn.Conv2d(channels if implementation == "convolution" else ppm.out_channels, o, 3, padding=1, bias=False)
    match implementation:
        case "fused":
            return ppm
        case "stock":
            return StockPPM(ppm)
        case "fused head":
            return FusedPSPHead(ppm, conv, nn.BatchNorm2d(o), nn.ReLU())
        case "stock head":
            return nn.Sequential(StockPPM(ppm), conv, nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())


def _measure(
    implementation: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
    training: bool,
) -> int:
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(training)
    n, c, h, w = shape
    module = make_module(implementation, c).to(device).train(training)
    if n == 1:
        module.features[0][2].eval()  # one value a channel has no batch statistics
    x = torch.empty(n, c, h, w, device=device, memory_format=memory_format).normal_()
    module(x[:, :, :8, :8])  # loads code and starts threads
    return growth(lambda: module(x), device)
