"""A head as mmsegmentation writes it, before and after fuse, and what a fused module's forward costs a function."""

from collections.abc import Callable

import pytest
import torch
from comparison import Comparison, nbytes
from foreign import MMPPM, ConvModule
from torch import Tensor, nn

from pspnet_fast import fuse

TABLE = {False: "fuse, evaluation: forward", True: "fuse, training: forward + backward"}
SIZES = {"UPerNet's on ConvNeXt-T, 16x16": (768, 16), "PSPNet's on ResNet-50, 60x60": (2048, 60)}


class Head(nn.Module):
    """The pyramid and its bottleneck, 512 channels each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.psp_modules = MMPPM((1, 2, 3, 6), channels, 512, False)
        self.bottleneck = ConvModule(channels + 4 * 512, 512, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([x, *self.psp_modules(x)], 1))


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", SIZES)
def test_head(
    measure: Callable[..., None], device: torch.device, name: str, training: bool, implementation: str
) -> None:
    """At batch 1 the norm of bin 1 has no batch statistics: it is in evaluation mode on both sides."""
    channels, size = SIZES[name]
    head = Head(channels).to(device).train(training)
    head.psp_modules[0].eval()
    if implementation == "fused":
        fuse(head)
    x = torch.randn(1, channels, size, size, device=device, requires_grad=training)
    grad = torch.randn(1, 512, size, size, device=device)

    def forget_gradients() -> None:
        x.grad = None
        head.zero_grad(set_to_none=True)

    against = Comparison(TABLE[training], name, nbytes(x, *head.parameters()), 1.0)
    if training:
        measure(against, implementation, lambda: head(x).backward(grad), forget_gradients)
    else:
        with torch.no_grad():
            measure(against, implementation, lambda: head(x))


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_other_functions(measure: Callable[..., None], device: torch.device, implementation: str) -> None:
    """A hundred functions that fuse has nothing to do with: the difference is what a fused forward adds to them."""

    class Hundred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(100):
                x = torch.neg(x)
            return x

    module = Hundred()
    if implementation == "fused":
        module = fuse(module, modules=[""])
    x = torch.zeros(1, device=device)
    measure(
        Comparison("fuse, 100 functions of one number", "torch.neg", nbytes(x), 1.0), implementation, lambda: module(x)
    )
