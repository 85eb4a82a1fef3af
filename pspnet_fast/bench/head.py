"""FusedPPM, FusedPSPHead and a fused head of mmsegmentation's, against the same of plain torch layers."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pspnet_fast.head
from pspnet_fast import FusedPPM, FusedPSPHead, fuse, ops, split_weight
from pspnet_fast.bench.cases import SMALL, Case, Compiler, Map, Step, convolves, maps, nbytes, training_step
from pspnet_fast.bench.stock import MMPPM, ConvModule, StockPPM

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 2048, 60, 60), (1, 2048, 90, 90))
EVALUATION, TRAINING = "evaluation: forward", "training: forward + backward"
# times faster than eager: on a CPU with AVX-512, and on an H200
PPM_TARGETS = {"cpu": {EVALUATION: 10.0, TRAINING: 8.0}, "cuda": {EVALUATION: 3.0, TRAINING: 3.0}}
HEAD_TARGETS = {
    "cpu": {
        torch.float32: {EVALUATION: 2.0, TRAINING: 1.95},
        torch.bfloat16: {EVALUATION: 1.9, TRAINING: 1.9},
    },
    "cuda": {dtype: {EVALUATION: 1.85, TRAINING: 1.7} for dtype in (torch.float32, torch.bfloat16)},
}
FUSED = {"UPerNet's on ConvNeXt-T, 16x16": (768, 16), "PSPNet's on ResNet-50, 60x60": (2048, 60)}


def cases(device: torch.device) -> Iterator[Case]:
    """All of this suite on a device."""
    for pass_ in (EVALUATION, TRAINING):
        for map in maps(device, SHAPES[0], (2, 2048, 60, 60), SHAPES[1], SMALL):
            usual, first = map.shape == SHAPES[0], map.first and map.shape == SHAPES[0]
            yield Case(
                "head", "ppm", f"FusedPPM, {pass_}", str(map), map.dtype, partial(_ppm, map, pass_ == TRAINING),
                1.0 if map.small else PPM_TARGETS[device.type][pass_],
                standard=usual, quick=first and pass_ == EVALUATION, compiles=first and pass_ == EVALUATION,
                stock=partial(_stock, map, False) if pass_ == EVALUATION else None,
            )  # fmt: skip
    for pass_ in (EVALUATION, TRAINING):
        for map in maps(device, *SHAPES, SMALL):
            usual, first = map.shape == SHAPES[0], map.first and map.shape == SHAPES[0]
            yield Case(
                "head", "head", f"FusedPSPHead, {pass_}", str(map), map.dtype, partial(_head, map, pass_ == TRAINING),
                1.0 if map.small else HEAD_TARGETS[device.type][map.dtype][pass_],
                standard=usual and map.usual and convolves(map.dtype, device), compiles=first and pass_ == EVALUATION,
                stock=partial(_stock, map, True) if pass_ == EVALUATION else None,
            )  # fmt: skip
    for map in maps(device, *SHAPES):
        table = "FusedPSPHead beside the convolution of x"
        yield Case("head", "head", table, str(map), map.dtype, partial(_beside_convolution, map), 1 / 1.06)
    for map in maps(device, SHAPES[0]):
        table = "FusedPSPHead, evaluation, against one that keeps its weight's parts"
        yield Case("head", "head", table, str(map), map.dtype, partial(_no_kept_weight, map), 1 / 1.04)
    for pass_ in (EVALUATION, TRAINING):
        for name, (channels, size) in FUSED.items():
            make, standard = partial(_fused, channels, 512, size, pass_ == TRAINING), channels == 768
            yield Case("head", "fuse", f"fuse, {pass_}", name, torch.float32, make, 1.0, standard=standard)
    table = "fuse, 100 functions of one number"
    yield Case("head", "fuse", table, "torch.neg", torch.float32, _other_functions, 1.0)


def _ppm(map: Map, training: bool, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """At batch 1 the norm of bin 1, without batch statistics there, is in evaluation mode on both sides."""
    fused = FusedPPM(map.shape[1]).to(device, map.dtype)
    module = (fused if ours else StockPPM(fused)).train(training)
    if map.shape[0] == 1:
        module.get_submodule("features.0.2").eval()
    x, output, weights = map.random(device), map.random(device, 2 * map.shape[1]), nbytes(*module.parameters())
    cells = 50 * map.shape[0]
    operations = 2 * cells * map.shape[1] ** 2 // 4 + x.numel() + 2 * x.numel()  # reduce, pool, upsample
    function = compiler(module)
    if training:
        # x and the output are read or written forward, their gradients backward; weights are read twice, written once
        return training_step(function, module, x, [x], (2 * nbytes(x, output) + 3 * weights, 3 * operations))
    return Step(torch.no_grad()(lambda: function(x)), nbytes(x, output) + weights, operations)


def _make_head(map: Map, device: torch.device, ours: bool, training: bool = False) -> nn.Module:
    """FusedPSPHead, or the stock pyramid and bottleneck."""
    ppm, out = FusedPPM(map.shape[1]), map.shape[1] // 4
    bottleneck = nn.Conv2d(ppm.out_channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    head = FusedPSPHead(ppm, *bottleneck) if ours else nn.Sequential(StockPPM(ppm), *bottleneck)
    head = head.to(device, map.dtype, memory_format=map.memory_format).train(training)  # type: ignore[call-overload]
    if map.shape[0] == 1:
        head.get_submodule("ppm.features.0.2" if ours else "0.features.0.2").eval()
    return head


def _stock(map: Map, bottleneck: bool, device: torch.device) -> tuple[nn.Module, Tensor]:
    """What another runtime gets: the stock pyramid, with or without the bottleneck, and its input."""
    module = _make_head(map, device, ours=False)
    return (module if bottleneck else module[0]), map.random(device)  # type: ignore[index]


def _head(map: Map, training: bool, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """With the operations of the convolution of x alone; three such in training."""
    head, x = _make_head(map, device, ours, training), map.random(device)
    n, c, h, w = map.shape
    operations = 2 * n * h * w * c * (c // 4) * 9
    moved = nbytes(x, *head.parameters()) + nbytes(x) // 4
    function = compiler(head)
    if training:
        return training_step(function, head, x, [x], (3 * moved, 3 * operations))
    return Step(torch.no_grad()(lambda: function(x)), moved, operations)


def _beside_convolution(map: Map, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """ "eager" is the convolution of x alone: the ratio is its share of the head's time, 0.94 or more is meant."""
    head, x = _make_head(map, device, ours=True), map.random(device)
    weight = head.bottleneck[0].weight[:, : map.shape[1]]  # type: ignore[index,union-attr]
    weight = weight.contiguous(memory_format=map.memory_format)
    function = compiler((lambda: head(x)) if ours else (lambda: F.conv2d(x, weight, padding=1)))
    return Step(torch.no_grad()(function), nbytes(x, weight), 2 * weight.numel() * x.numel() // map.shape[1])


def _no_kept_weight(map: Map, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """ "eager" is a head that would keep its weight's parts between calls, at the risk of old ones: 0.96 is meant."""
    head, x = _make_head(map, device, ours=True), map.random(device)
    kept = _keeping()

    def keeping() -> Tensor:
        with mock.patch.object(pspnet_fast.head, "level_products", kept):
            return head(x)

    return Step(torch.no_grad()(compiler((lambda: head(x)) if ours else keeping)), nbytes(x))


def _keeping() -> Callable[..., Any]:
    """level_products with the first call's parts."""
    kept: list[Any] = []

    def products(weight: Tensor, dense: int, dense_first: bool, reduced: Tensor, bins: list[int], dtype: Any) -> Any:
        if not kept:
            levels = len(bins) // 2
            kept.extend(ops.pyramid_split_weight(weight, dense, levels, dense_first=dense_first, dtype=dtype))
        first, matrices = kept
        return first, split_weight.taps_of(reduced, matrices, bins, weight)

    return products


class _MMHead(nn.Module):
    """The pyramid and its bottleneck as mmsegmentation writes them, of so many channels each."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.psp_modules = MMPPM((1, 2, 3, 6), channels, out, False)
        self.bottleneck = ConvModule(channels + 4 * out, out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([x, *self.psp_modules(x)], 1))


def _fused(
    channels: int, out: int, size: int, training: bool, device: torch.device, ours: bool, compiler: Compiler[Any]
) -> Step:
    """Before and after fuse. At batch 1 the norm of bin 1 is in evaluation mode on both sides."""
    head = _MMHead(channels, out).to(device).train(training)
    head.psp_modules[0].eval()
    if ours:
        fuse(head)
    x = torch.randn(1, channels, size, size, device=device)
    least = nbytes(x, *head.parameters()), 2 * 9 * out * x.numel()
    function = compiler(head)
    if training:
        return training_step(function, head, x, [x], (3 * least[0], 3 * least[1]))
    return Step(torch.no_grad()(lambda: function(x)), *least)


def _other_functions(device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """A hundred functions that fuse has nothing to do with: the difference is what a fused forward adds to them."""

    class Hundred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(100):
                x = torch.neg(x)
            return x

    module = fuse(Hundred(), modules=[""]) if ours else Hundred()
    x, function = torch.zeros(1, device=device), compiler(module)
    return Step(lambda: function(x), nbytes(x))
