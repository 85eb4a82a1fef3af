"""The operators, each alone, against pspnet_fast.reference or what the operator stands for in plain torch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pspnet_fast import ops, reference
from pspnet_fast.bench.cases import (
    LAYOUTS,
    SMALL,
    SMALL_LOGITS,
    Case,
    Compiler,
    Direction,
    Map,
    Step,
    dtype_name,
    maps,
    nbytes,
    step_of,
    upsampled_size,
)  # fmt: skip

BINS, CELLS = (1, 2, 3, 6), 50
DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def cases(device: torch.device) -> Iterator[Case]:
    """All of this suite on a device."""
    yield from (*_of_maps(device), *_of_cells(), *_of_weights(), *_of_logits(device), *_of_labels())


def _of_maps(device: torch.device) -> Iterator[Case]:
    groups: list[tuple[str, Callable[..., Step], list[Map]]] = [
        ("pyramid_pool", _pool, maps(device, (1, 2048, 60, 60), SMALL)),
        ("pyramid_upsample_concat_", _upsample_concat, maps(device, (1, 2048, 60, 60), SMALL)),
        ("pyramid_context_", _context, maps(device, (1, 512, 60, 60), (1, 512, 90, 90), SMALL)),
    ]
    for group, make, chosen in groups:
        for map in chosen:
            for direction in DIRECTIONS:
                yield Case(
                    "ops", group, group, f"{map} {direction}", map.dtype, partial(make, map, direction),
                    standard=map.usual and map.shape[2] == 60, quick=map.first and map.shape[2] == 60,
                )  # fmt: skip


def _of_cells() -> Iterator[Case]:
    for batch, channels in ((1, 2048), (2, 2048), (1, 64)):
        for dtype in DTYPES:
            for direction in DIRECTIONS:
                name = f"{_batch_of(batch, channels)} {dtype_name(dtype)} {direction}"
                make, standard = partial(_reduce, batch, channels, dtype, direction), batch == 1 and channels == 2048
                yield Case("ops", "pyramid_reduce", "pyramid_reduce", name, dtype, make, standard=standard)
    for batch, channels in ((2, 2048), (16, 2048), (2, 64)):
        for dtype in DTYPES:
            name = f"{_batch_of(batch, channels)} {dtype_name(dtype)}"
            make = partial(_batch_norm, batch, channels // len(BINS), dtype)
            yield Case("ops", "pyramid_batch_norm", "pyramid_batch_norm", name, dtype, make, standard=batch == 16)


def _batch_of(batch: int, channels: int) -> str:
    """The channels only where they are few."""
    return f"batch {batch}" if channels == 2048 else f"batch {batch}, {channels} channels"


def _of_weights() -> Iterator[Case]:
    group = "pyramid_split_weight"
    for channels in (2048, 64):
        for dtype in DTYPES:
            for layout in LAYOUTS:
                for direction in DIRECTIONS:
                    name = f"{dtype_name(dtype)} {dtype_name(layout)} {direction}"  # type: ignore[arg-type]
                    name = name if channels == 2048 else f"{channels} channels {name}"
                    make = partial(_split_weight, (channels // 4, 2 * channels, 3, 3), dtype, layout, direction)
                    standard = dtype == torch.float32 and layout == torch.contiguous_format and channels == 2048
                    yield Case("ops", group, group, name, dtype, make, standard=standard)


def _of_logits(device: torch.device) -> Iterator[Case]:
    chosen = maps(device, (2, 150, 60, 60), (2, 19, 60, 60), SMALL_LOGITS)
    for map in chosen:
        size, small = upsampled_size(map), map.small
        for confidence in (False, True):
            yield Case(
                "ops", "upsample_argmax", f"upsample_argmax to {size[0]}x{size[1]}",
                f"{map} {'with confidence' if confidence else 'classes'}", map.dtype,
                partial(_argmax, map, size, confidence), None if small else 10,
                standard=map.usual and (map.first or map.shape[1] == 150) and not confidence and not small,
                quick=map.first and map.shape[1] == 19 and not confidence and not small,
                compiles=map.first and map.shape[1] == 150 and not confidence,
            )  # fmt: skip
    for map in chosen:
        size, small = upsampled_size(map), map.small
        group, make = "upsample_softmax_accumulate_", partial(_accumulate, map, size)
        quick = map.first and map.shape[1] == 19 and not small
        standard = map.usual and (map.first or map.shape[1] == 150) and not small
        table = f"{group} to {size[0]}x{size[1]}, mirrored"
        yield Case("ops", group, table, str(map), map.dtype, make, standard=standard, quick=quick)


def _of_labels() -> Iterator[Case]:
    for classes, size in ((19, 473), (150, 473), (19, 128)):
        name, make = f"2x{size}x{size}, {classes} classes", partial(_confusion, classes, size)
        yield Case(
            "ops", "confusion_matrix", "confusion_matrix", name, torch.float32, make, standard=size == 473,
            quick=classes == 19 and size == 473,
        )  # fmt: skip


def _pool(map: Map, direction: Direction, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """With the copy into the concatenation that FusedPPM asks of it, against a copy."""
    x, concat = map.random(device), map.random(device, 2 * map.shape[1])

    def fused() -> tuple[Tensor, Tensor]:
        return ops.pyramid_pool(x, BINS, concat=concat), concat

    def eager() -> tuple[Tensor, Tensor]:
        return reference.pyramid_pool(x, BINS), x.clone()

    return step_of(compiler(fused if ours else eager), direction, [x], 2 * nbytes(x), x.numel())


def _upsample_concat(map: Map, direction: Direction, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """Into the context half of a concatenation, against interpolation and torch.cat."""
    n, channels, h, w = map.shape
    r = channels // len(BINS)
    concat = map.random(device, 2 * channels)
    reduced = torch.randn(n, CELLS, r, dtype=map.dtype, device=device)
    levels = [z.mT.reshape(n, r, b, b) for b, z in zip(BINS, reduced.split([b * b for b in BINS], 1), strict=True)]
    levels = [z.contiguous(memory_format=map.memory_format) for z in levels]

    def fused() -> Tensor:
        return ops.pyramid_upsample_concat_(concat, reduced, BINS, offset=channels)

    def eager() -> Tensor:
        return torch.cat([F.interpolate(z, (h, w), mode="bilinear", align_corners=True) for z in levels], 1)

    inputs, written = [reduced] if ours else levels, concat.numel() // 2
    return step_of(compiler(fused if ours else eager), direction, inputs, nbytes(concat) // 2, 2 * written)


def _context(map: Map, direction: Direction, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """With the norm and ReLU that evaluation asks of it. Of 36 products an element, 21 are not of zeros."""
    op, channels = (ops if ours else reference).pyramid_context_, map.shape[1]
    conv, taps = map.random(device), torch.randn(map.shape[0], CELLS, 9, channels, dtype=map.dtype, device=device)
    norm = (*torch.rand(4, channels, dtype=map.dtype, device=device), 1e-5)

    def forward() -> Tensor:
        return op(conv, taps, BINS, 3, norm=norm, relu=True) if direction == "forward" else op(conv, taps, BINS, 3)

    moved = nbytes(conv) * (2 if direction == "forward" else 1)
    return step_of(compiler(forward), direction, [taps], moved, 2 * 21 * conv.numel())


def _reduce(
    batch: int, channels: int, dtype: torch.dtype, direction: Direction, device: torch.device, ours: bool,
    compiler: Compiler[Any],
) -> Step:  # fmt: skip
    """Forward as inference runs it, with norm and ReLU: one matrix product; two backward."""
    op = compiler((ops if ours else reference).pyramid_reduce)
    pooled = torch.randn(batch, CELLS, channels, dtype=dtype, device=device)
    reduced = channels // len(BINS)
    weights = [torch.randn(reduced, channels, dtype=dtype, device=device) for _ in BINS]
    norm = [(*torch.rand(4, reduced, dtype=dtype, device=device), 1e-5) for _ in BINS]

    def forward() -> Tensor:
        return op(pooled, weights, BINS, norm=norm, relu=True) if direction == "forward" else op(pooled, weights, BINS)

    products = 1 if direction == "forward" else 2
    operations = products * 2 * pooled.numel() * reduced
    return step_of(forward, direction, [pooled, *weights], products * nbytes(*weights), operations)


def _batch_norm(
    batch: int, channels: int, dtype: torch.dtype, device: torch.device, ours: bool, compiler: Compiler[Any]
) -> Step:
    """In training: forward and backward."""
    op = compiler((ops if ours else reference).pyramid_batch_norm)
    reduced = torch.randn(batch, CELLS, channels, dtype=dtype, device=device, requires_grad=True)
    norm = [(*torch.rand(4, channels, device=device).unbind(), 1e-5) for _ in BINS]
    grad = torch.randn_like(reduced)

    def step() -> tuple[Tensor, ...]:
        output = op(reduced, BINS, norm, training=[True] * 4, momentum=[0.1] * 4, relu=True)
        return torch.autograd.grad(output, reduced, grad)

    return Step(step, 5 * nbytes(reduced), 10 * reduced.numel())


def _split_weight(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, direction: Direction,
    device: torch.device, ours: bool, compiler: Compiler[Any],
) -> Step:  # fmt: skip
    """As the head splits its 3x3 weight."""
    op = compiler((ops if ours else reference).pyramid_split_weight)
    weight = torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=layout)
    return step_of(lambda: op(weight, shape[1] // 2, 4), direction, [weight], 2 * nbytes(weight), 0)


def _argmax(
    map: Map, size: tuple[int, int], confidence: bool, device: torch.device, ours: bool, compiler: Compiler[Any]
) -> Step:
    """Against interpolation, softmax and maximum. A class and pixel is three operations at least."""
    logits = map.random(device)

    def eager() -> object:
        values = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
        return values.softmax(1).max(1) if confidence else values.argmax(1)

    def fused() -> object:
        if confidence:
            return ops.upsample_argmax(logits, size, align_corners=True, return_confidence=True)
        return ops.upsample_argmax(logits, size, align_corners=True)

    pixels = map.shape[0] * size[0] * size[1]
    moved, operations = nbytes(logits) + pixels * (5 if confidence else 1), 5 if confidence else 3
    return Step(torch.no_grad()(compiler(fused if ours else eager)), moved, operations * pixels * map.shape[1])


def _accumulate(map: Map, size: tuple[int, int], device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """Into a whole map, against interpolation, softmax, mirroring and addition."""
    logits = map.random(device)
    n, k = map.shape[:2]
    probabilities = torch.zeros(n, k, *size, device=device).contiguous(memory_format=map.memory_format)

    def eager() -> object:
        p = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True).softmax(1)
        return probabilities.add_(p.flip(3), alpha=0.5)

    def fused() -> object:
        return ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True, mirrored=True, weight=0.5)

    moved = nbytes(logits) + 2 * nbytes(probabilities)
    return Step(torch.no_grad()(compiler(fused if ours else eager)), moved, 6 * probabilities.numel())


def _confusion(classes: int, size: int, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """On label maps of regions, against torch.bincount on the pixels that count."""
    regions = torch.randint(0, classes, (2, 1, 40, 40), device=device).float()
    target = F.interpolate(regions, (size, size)).squeeze(1).long()
    target[:, ::20] = 255
    prediction = torch.where(torch.rand(target.shape, device=device) < 0.9, target, target.roll(1))
    prediction = prediction.clamp(max=classes - 1).to(torch.uint8)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    op = compiler((ops if ours else reference).confusion_matrix)
    return Step(lambda: op(prediction, target, classes, out=counts), nbytes(prediction, target))
