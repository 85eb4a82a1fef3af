"""FusedUpsampleConcat against plain torch layers: the convolutions of upsampled maps in heads that people use."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from comparison import IMPLEMENTATIONS, LAYOUTS, Comparison
from torch import Tensor, nn

from pspnet_fast import FusedUpsampleConcat

EVALUATION, TRAINING = "FusedUpsampleConcat, evaluation: forward", "FusedUpsampleConcat, training: forward + backward"
TARGET = 2.6  # of UPerNet's, which is the largest convolution of any of these heads


@dataclass(frozen=True)
class Head:
    """A convolution of maps of so many channels, at these sizes; the first is the result's."""

    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    out_channels: int
    kernel_size: int
    target: float = 1.0


HEADS = {  # of images of 512x512
    "UPerNet's fpn_bottleneck": Head((512, 512, 512, 512), (128, 64, 32, 16), 512, 3, TARGET),
    "SegFormer-B2's linear_fuse": Head((768, 768, 768, 768), (128, 64, 32, 16), 768, 1),
    "HRNet-W48-OCR's conv3x3": Head((48, 96, 192, 384), (128, 64, 32, 16), 512, 3),
    "DeepLabV3+, dense": Head((48, 256), (128, 32), 256, 3),
}


@dataclass(frozen=True)
class Case:
    """One of HEADS in one dtype and memory format."""

    name: str
    dtype: torch.dtype
    memory_format: torch.memory_format

    def __str__(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')} {LAYOUTS[self.memory_format]}"

    @property
    def head(self) -> Head:
        return HEADS[self.name]


CASES = [Case(name, dtype, layout) for name in HEADS for dtype in (torch.float32, torch.bfloat16) for layout in LAYOUTS]


class Stock(nn.Module):
    """What FusedUpsampleConcat is in plain torch, of the same layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        return self.layers(torch.cat([maps[0], *(F.interpolate(z, size, mode="bilinear") for z in maps[1:])], 1))


def make(implementation: str, case: Case, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    """The module and its maps."""
    head = case.head
    conv = nn.Conv2d(sum(head.channels), head.out_channels, head.kernel_size, padding="same", bias=False)
    layers = conv, nn.BatchNorm2d(head.out_channels), nn.ReLU()
    module: nn.Module = FusedUpsampleConcat(*layers) if implementation == "fused" else Stock(*layers)
    if implementation == "compile":
        module.compile(dynamic=False)
    maps = [
        torch.randn(1, channels, size, size, device=device, dtype=case.dtype).contiguous(
            memory_format=case.memory_format
        )
        for channels, size in zip(head.channels, head.sizes, strict=True)
    ]
    return module.to(device, case.dtype, memory_format=case.memory_format), maps


def comparison(table: str, case: Case, passes: int) -> Comparison:
    """With the bytes of maps, weight and result, and the operations of the convolution at low resolution."""
    head, taps = case.head, case.head.out_channels * case.head.kernel_size**2
    elements = sum(c * size * size for c, size in zip(head.channels, head.sizes, strict=True))
    written = head.out_channels * head.sizes[0] ** 2
    floor_bytes = passes * (elements + written + taps * sum(head.channels)) * case.dtype.itemsize
    return Comparison(table, str(case), floor_bytes, head.target, passes * 2 * taps * elements, case.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluation(measure: Callable[..., None], device: torch.device, case: Case, implementation: str) -> None:
    module, maps = make(implementation, case, device)
    module.eval()
    with torch.no_grad():
        measure(comparison(EVALUATION, case, 1), implementation, lambda: module(maps))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(measure: Callable[..., None], device: torch.device, case: Case, implementation: str) -> None:
    module, maps = make(implementation, case, device)
    for map in maps:
        map.requires_grad_()
    grad = torch.randn_like(module(maps))

    def forget_gradients() -> None:
        module.zero_grad(set_to_none=True)
        for map in maps:
            map.grad = None

    measure(comparison(TRAINING, case, 3), implementation, lambda: module(maps).backward(grad), forget_gradients)
