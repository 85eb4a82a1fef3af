"""What is profiled: the operators at the sizes of the benchmarks, with the least that each has to do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import pspnet_fast  # noqa: F401  (registers the operators)

BINS = [1, 1, 2, 2, 3, 3, 6, 6]
CHANNELS, REDUCED, CELLS, OUTPUTS = 2048, 512, 50, 512
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
IMAGE = {60: 473, 90: 713}  # of the features' sizes


@dataclass(frozen=True)
class Case:
    """One call. Units are 16-byte vectors of what must be read and written, or classes and pixels."""

    operator: str
    dtype: str
    layout: str
    batch: int
    size: int
    classes: int = 0

    def __str__(self) -> str:
        name = f"{self.operator} {self.dtype} {self.layout} {self.batch}x{self.size}x{self.size}"
        return name + (f" K={self.classes}" if self.classes else "")


@dataclass
class Work:
    """The call, the bytes that it must move, and the units of its work."""

    call: Callable[[], object]
    floor_bytes: int
    units: int
    unit: str = "vector"
    specials: int = 0  # exponentials that its arithmetic takes


def filled(*shape: int, dtype: torch.dtype, layout: str = "planar") -> Tensor:
    """Random numbers, the same 65521 over and over: large maps take no time."""
    pattern = torch.randn(65521, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)
    count = torch.Size(shape).numel()
    flat = torch.empty(count, dtype=dtype)  # on the default device, as all tensors of a case
    whole = count // len(pattern)
    flat[: whole * len(pattern)].view(whole, len(pattern)).copy_(pattern)
    flat[whole * len(pattern) :] = pattern[: count - whole * len(pattern)]
    if layout == "planar":
        return flat.view(shape)
    N, C, H, W = shape
    return flat.view(N, H, W, C).permute(0, 3, 1, 2)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moving(call: Callable[[], object], floor_bytes: int) -> Work:
    return Work(call, floor_bytes, floor_bytes // 16)


def build(case: Case) -> Work:
    """The tensors and the call of a case."""
    o, dtype = torch.ops.pspnet_fast, DTYPES.get(case.dtype, torch.int64)
    N, H = case.batch, case.size
    last = case.layout == "channels_last"

    def a_map(channels: int, size: int = H) -> Tensor:
        return filled(N, channels, size, size, dtype=dtype, layout=case.layout)

    if case.operator == "pyramid_pool":
        x, concat = a_map(CHANNELS), a_map(2 * CHANNELS)
        return moving(lambda: o.pyramid_pool(x, concat, 0, BINS), 2 * nbytes(x))
    if case.operator == "pyramid_pool_backward":
        cells, concat = filled(N, CELLS, CHANNELS, dtype=dtype), a_map(2 * CHANNELS)
        return moving(lambda: o.pyramid_pool_backward(cells, concat, 0, BINS, H, H, last), nbytes(concat))
    if case.operator.startswith("pyramid_reduce"):
        cells, reduced = filled(N, CELLS, CHANNELS, dtype=dtype), filled(N, CELLS, REDUCED, dtype=dtype)
        weights = [filled(REDUCED, CHANNELS, 1, 1, dtype=dtype) for _ in range(4)]
        products = N * CELLS * REDUCED * CHANNELS
        if case.operator == "pyramid_reduce":
            norm = [filled(REDUCED, dtype=dtype).abs() for _ in range(16)]
            return Work(
                lambda: o.pyramid_reduce(cells, weights, norm, [1e-5] * 4, True, BINS),
                nbytes(cells, reduced, *weights),
                products,
                "product",
            )
        return Work(
            lambda: o.pyramid_reduce_backward(reduced, cells, weights, BINS),
            2 * nbytes(cells, *weights) + nbytes(reduced),
            2 * products,
            "product",
        )
    if case.operator.startswith("pyramid_batch_norm"):
        cells = filled(N, CELLS, REDUCED, dtype=dtype)
        norm = [list(filled(4, REDUCED, dtype=torch.float32).abs().unbind()) for _ in range(4)]
        weights, biases, means, variances = (list(values) for values in zip(*norm, strict=True))
        settings = ([1] * 4, [0.1] * 4, [1e-5] * 4, True, BINS)
        forward = lambda: o.pyramid_batch_norm(cells, weights, biases, means, variances, *settings)  # noqa: E731
        if case.operator == "pyramid_batch_norm":
            return moving(forward, 2 * nbytes(cells))
        output, statistics = forward()
        arguments = (cells, cells, output, weights, statistics, [1] * 4, [1e-5] * 4, BINS)
        return moving(lambda: o.pyramid_batch_norm_backward(*arguments), 4 * nbytes(cells))
    if case.operator.startswith("pyramid_split_weight"):
        weight = filled(OUTPUTS, 2 * CHANNELS, 3, 3, dtype=dtype, layout=case.layout)
        if case.operator == "pyramid_split_weight":
            return moving(lambda: o.pyramid_split_weight(weight, CHANNELS, True, 4, dtype), 2 * nbytes(weight))
        grads = o.pyramid_split_weight(weight, CHANNELS, True, 4, dtype)
        settings = (True, last, dtype)
        return moving(lambda: o.pyramid_split_weight_backward(*grads, *settings), 2 * nbytes(weight))
    if case.operator == "pyramid_upsample_concat_":
        concat, cells = a_map(2 * CHANNELS), filled(N, CELLS, REDUCED, dtype=dtype)
        return moving(lambda: o.pyramid_upsample_concat_(concat, cells, CHANNELS, BINS, True), nbytes(concat) // 2)
    if case.operator == "pyramid_upsample_concat_backward":
        concat = a_map(2 * CHANNELS)
        return moving(
            lambda: o.pyramid_upsample_concat_backward(concat, CHANNELS, REDUCED, BINS, True), nbytes(concat) // 2
        )
    if case.operator == "pyramid_context_":
        conv, taps = a_map(OUTPUTS), filled(N, CELLS, 9, OUTPUTS, dtype=dtype)
        norm = [filled(OUTPUTS, dtype=dtype).abs() for _ in range(4)]
        settings = (True, BINS, [3, 3], [1, 1], 1, True)
        return moving(lambda: o.pyramid_context_(conv, taps, norm, 1e-5, *settings), 2 * nbytes(conv))
    if case.operator == "pyramid_context_backward":
        conv = a_map(OUTPUTS)
        return moving(lambda: o.pyramid_context_backward(conv, BINS, [3, 3], [1, 1], 1), nbytes(conv))
    if case.operator == "confusion_matrix_":
        counts = torch.zeros(case.classes, case.classes, dtype=torch.int64)
        target = of_classes(N, IMAGE[H], case.classes)
        prediction = target.roll(1).to(torch.uint8)
        bytes_ = nbytes(target, prediction)
        return Work(lambda: o.confusion_matrix_(counts, prediction, target, 255), bytes_, target.numel(), "pixel")
    return of_logits(case, a_map(case.classes))


def of_classes(N: int, size: int, classes: int) -> Tensor:
    """Classes in patches of 16 x 16 pixels, as those of images lie together."""
    shape, generator = (N, size // 16 + 1, size // 16 + 1), torch.Generator().manual_seed(0)
    coarse = torch.randint(classes, shape, generator=generator, device="cpu").to(torch.get_default_device())
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :size, :size].contiguous()


def of_logits(case: Case, logits: Tensor) -> Work:
    o, N, K, size = torch.ops.pspnet_fast, case.batch, case.classes, IMAGE[case.size]
    units = N * K * size * size
    if case.operator == "upsample_argmax":
        call = lambda: o.upsample_argmax(logits, size, size, True, False)  # noqa: E731
        return Work(call, nbytes(logits) + units // K, units, "class and pixel")
    if case.operator == "upsample_softmax_accumulate_":
        total = torch.zeros(N, K, size, size)
        call = lambda: o.upsample_softmax_accumulate_(total, logits, 0, 0, size, size, True, False, 1.0)  # noqa: E731
        return Work(call, nbytes(logits) + 2 * nbytes(total), units, "class and pixel", units)
    target, lse = of_classes(N, size, K), torch.full((N, size, size), 3.0)
    rest = (True, 255, 0.0, 1)
    if case.operator == "upsample_cross_entropy":
        call = lambda: o.upsample_cross_entropy(logits, target, None, *rest)  # noqa: E731
        return Work(call, nbytes(logits, target, lse), units, "class and pixel", units)
    one, total = torch.ones(()), torch.tensor(float(target.numel()))
    call = lambda: o.upsample_cross_entropy_backward(one, logits, target, None, lse, total, *rest)  # noqa: E731
    return Work(call, 2 * nbytes(logits) + nbytes(target, lse), units, "class and pixel", units)


OF_MAPS = ("pyramid_pool", "pyramid_pool_backward", "pyramid_upsample_concat_", "pyramid_upsample_concat_backward")
OF_MAPS += ("pyramid_context_", "pyramid_context_backward")
OF_CELLS = ("pyramid_reduce", "pyramid_reduce_backward")
OF_BATCHES = ("pyramid_batch_norm", "pyramid_batch_norm_backward")
OF_WEIGHTS = ("pyramid_split_weight", "pyramid_split_weight_backward")
OF_LOGITS = ("upsample_cross_entropy", "upsample_cross_entropy_backward")
OF_PREDICTION = ("upsample_argmax", "upsample_softmax_accumulate_")


def cases() -> Iterator[Case]:
    """All of them, the most telling first: bfloat16 at 16 x 60 x 60."""
    for size in IMAGE:
        for batch in (16, 1):
            for dtype in DTYPES:
                for layout in ("planar", "channels_last"):
                    yield from (Case(name, dtype, layout, batch, size) for name in OF_MAPS)
                    for classes in (150, 19):
                        names = OF_LOGITS + (OF_PREDICTION if batch == 1 or size == 60 else ())
                        yield from (Case(name, dtype, layout, batch, size, classes) for name in names)
                if size == 60:
                    names = OF_CELLS + (OF_BATCHES if batch > 1 else ())
                    yield from (Case(name, dtype, "planar", batch, size) for name in names)
            if size == 60 and batch == 1:
                layouts = ("planar", "channels_last")
                yield from (Case(name, d, layout, 1, 60) for d in DTYPES for layout in layouts for name in OF_WEIGHTS)
            yield from (Case("confusion_matrix_", "int64", "planar", batch, size, classes) for classes in (150, 19))
