"""FusedUpsampleConcat against plain torch layers: the convolutions of upsampled maps in heads that people use."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pspnet_fast import FusedUpsampleConcat
from pspnet_fast.bench.cases import DTYPES, LAYOUTS, Case, Compiler, Step, dtype_name, training_step
from pspnet_fast.bench.stock import StockUpsampleConcat

EVALUATION, TRAINING = "FusedUpsampleConcat, evaluation: forward", "FusedUpsampleConcat, training: forward + backward"


@dataclass(frozen=True)
class Head:
    """A convolution of maps of so many channels, at these sizes; the first is the result's."""

    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    out_channels: int
    kernel_size: int
    target: float = 1.0
    standard: tuple[str, ...] = ()


HEADS = {  # of images of 512x512; UPerNet's is the largest convolution of any of these heads
    "UPerNet's fpn_bottleneck": Head((512, 512, 512, 512), (128, 64, 32, 16), 512, 3, 2.6, (EVALUATION,)),
    "SegFormer-B2's linear_fuse": Head((768,) * 4, (128, 64, 32, 16), 768, 1, standard=(EVALUATION, TRAINING)),
    "HRNet-W48-OCR's conv3x3": Head((48, 96, 192, 384), (128, 64, 32, 16), 512, 3),
    "DeepLabV3+, dense": Head((48, 256), (128, 32), 256, 3, standard=(EVALUATION, TRAINING)),
}


def cases(device: torch.device) -> Iterator[Case]:
    """All of this suite; the same on every device."""
    for table in (EVALUATION, TRAINING):
        for name, head in HEADS.items():
            for dtype in DTYPES.values():
                for layout in LAYOUTS:
                    first = dtype == torch.float32 and layout == torch.contiguous_format
                    yield Case(
                        "upsampled", "upsample_concat", table,
                        f"{name}, {dtype_name(dtype)} {LAYOUTS[layout]}", dtype,
                        partial(_step, head, table == TRAINING, dtype, layout), head.target,
                        standard=first and table in head.standard,
                        quick=first and table == EVALUATION and name.startswith("DeepLab"),
                    )  # fmt: skip


def _step(
    head: Head, training: bool, dtype: torch.dtype, layout: torch.memory_format, device: torch.device, ours: bool,
    compiler: Compiler[Any],
) -> Step:  # fmt: skip
    """With the bytes of maps, weight and result, and the operations of the convolution at low resolution."""
    conv = nn.Conv2d(sum(head.channels), head.out_channels, head.kernel_size, padding="same", bias=False)
    layers = conv, nn.BatchNorm2d(head.out_channels), nn.ReLU()
    module = (FusedUpsampleConcat if ours else StockUpsampleConcat)(*layers)
    module = module.to(device, dtype, memory_format=layout).train(training)  # type: ignore[call-overload]
    maps = [
        torch.randn(1, channels, size, size, device=device, dtype=dtype).contiguous(memory_format=layout)
        for channels, size in zip(head.channels, head.sizes, strict=True)
    ]
    taps, passes = head.out_channels * head.kernel_size**2, 3 if training else 1
    elements = sum(c * size * size for c, size in zip(head.channels, head.sizes, strict=True))
    written = head.out_channels * head.sizes[0] ** 2
    moved = passes * (elements + written + taps * sum(head.channels)) * dtype.itemsize
    least = moved, passes * 2 * taps * elements
    function = compiler(module)
    if training:
        return training_step(function, module, maps, maps, least)
    return Step(torch.no_grad()(lambda: function(maps)), *least)
