"""The head of plain torch layers, and heads to compare with it."""

import copy
import itertools

import torch
from torch import Tensor, nn

from pspnet_fast import FusedPPM, FusedPSPHead
from pspnet_fast.bench.stock import StockPPM
from pspnet_fast.ops.checks import memory_format


class StockHead(nn.Module):
    """The concatenated form, on a copy of the parameters; the same keys.

    The convolution gets the memory format of x, which torch.cat may lose: oneDNN's algorithms differ in accuracy.
    """

    def __init__(self, fused: FusedPSPHead) -> None:
        super().__init__()
        self.ppm, self.bottleneck = StockPPM(fused.ppm), copy.deepcopy(fused.bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.ppm(x).contiguous(memory_format=memory_format(x)))


def make_head(
    c=8, r=5, o=6, bins=(1, 2, 3, 6), kernel_size=3, dilation=1, bias=False, align_corners=True,
    concat="input_first", norm=nn.BatchNorm2d, activation=nn.ReLU,
) -> FusedPSPHead:  # fmt: skip
    """Norms with statistics and affine parameters that are not the identity."""
    ppm = FusedPPM(c, r, bins, align_corners, concat, norm_layer=norm, activation=activation)
    sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    padding = tuple(k // 2 * dilation for k in sizes)
    conv = nn.Conv2d(ppm.out_channels, o, sizes, padding=padding, dilation=dilation, bias=bias)
    module = FusedPSPHead(ppm, conv, norm(o), activation())
    generator = torch.Generator().manual_seed(3)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            with torch.no_grad():
                centred = name.endswith(("bias", "running_mean"))  # or else most of a ReLU's outputs are 0
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + (-0.5 if centred else 0.5))
    return module
