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
DTYPES = (torch.float32, torch.bfloat16)


class Stock(nn.Module):
    """What FusedUpsampleConcat is in plain torch, of the same layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        return self.layers(torch.cat([maps[0], *(F.interpolate(z, size, mode="bilinear") for z in maps[1:])], 1))


def make(
    implementation: str, head: Head, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> tuple[nn.Module, list[Tensor]]:
    """The module and its maps."""
    conv = nn.Conv2d(sum(head.channels), head.out_channels, head.kernel_size, padding="same", bias=False)
    layers = conv, nn.BatchNorm2d(head.out_channels), nn.ReLU()
    module: nn.Module = FusedUpsampleConcat(*layers) if implementation == "fused" else Stock(*layers)
    if implementation == "compile":
        module.compile(dynamic=False)
    maps = [
        torch.randn(1, channels, size, size, device=device, dtype=dtype).contiguous(memory_format=layout)
        for channels, size in zip(head.channels, head.sizes, strict=True)
    ]
    return module.to(device, dtype, memory_format=layout), maps


def comparison(table: str, name: str, dtype: torch.dtype, layout: torch.memory_format, passes: int) -> Comparison:
    """With the bytes of maps, weight and result, and the operations of the convolution at low resolution."""
    head = HEADS[name]
    cells = [size * size for size in head.sizes]
    taps = head.out_channels * head.kernel_size**2
    elements = sum(c * n for c, n in zip(head.channels, cells, strict=True)) + head.out_channels * cells[0]
    operations = 2 * taps * sum(c * n for c, n in zip(head.channels, cells, strict=True))
    case = f"{name}, {str(dtype).removeprefix('torch.')} {LAYOUTS[layout]}"
    floor_bytes = passes * (elements + taps * sum(head.channels)) * dtype.itemsize
    return Comparison(table, case, floor_bytes, head.target, passes * operations, dtype)


every_case = [
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS),
    pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUTS.values()),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("name", HEADS),
]


def for_every_case(test: Callable[..., None]) -> Callable[..., None]:
    for mark in every_case:
        test = mark(test)
    return test


@for_every_case
def test_evaluation(
    measure: Callable[..., None],
    device: torch.device,
    name: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    implementation: str,
) -> None:
    module, maps = make(implementation, HEADS[name], dtype, layout, device)
    module.eval()
    with torch.no_grad():
        measure(comparison(EVALUATION, name, dtype, layout, 1), implementation, lambda: module(maps))


@for_every_case
def test_training(
    measure: Callable[..., None],
    device: torch.device,
    name: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    implementation: str,
) -> None:
    module, maps = make(implementation, HEADS[name], dtype, layout, device)
    for map in maps:
        map.requires_grad_()
    grad = torch.randn_like(module(maps))

    def forget_gradients() -> None:
        module.zero_grad(set_to_none=True)
        for map in maps:
            map.grad = None

    against = comparison(TRAINING, name, dtype, layout, 3)
    measure(against, implementation, lambda: module(maps).backward(grad), forget_gradients)
