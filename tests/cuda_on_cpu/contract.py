"""Random calls of the kernels by the contract of csrc/kernels.h, against the reference in float64.

The operators' own tests go through torch, which never hands a kernel an output that is a slice at an odd address, nor
many levels at many widths at once. Here inputs and outputs are such slices, with NaN around them and NaN in outputs
and workspace; each call is made twice and must give the same bits.

    python contract.py --cases 40 --seed 0 --sanitizer thread      (in the environment of backend.preload)
"""

import argparse
import ctypes
import math
import random
from collections.abc import Callable
from pathlib import Path

import backend
import torch
from torch import Tensor

from pspnet_fast import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of kernels.h
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-10}
SIZES = [(1, 1), (3, 2), (7, 7), (13, 9), (60, 60), (61, 97)]
BINS: list[tuple[tuple[int, int], ...]] = [
    ((1, 1), (2, 2), (3, 3), (6, 6)),
    ((1, 1),),
    ((2, 2), (4, 4)),
    ((1, 1), (3, 3), (6, 6), (8, 8)),
    ((2, 5), (3, 1)),
    ((9, 9), (7, 40)),  # larger than most images
    ((1, 150), (2, 3)),  # more edges than the kernels' tables hold
]
CHANNELS = [1, 3, 8, 20, 33, 64]
LAYOUTS = ["dense", "channels", "slice"]
MOST_LEVELS = 16

_Int, _Long, _Bool, _Pointer, _Double = ctypes.c_int, ctypes.c_int64, ctypes.c_bool, ctypes.c_void_p, ctypes.c_double


class Levels(ctypes.Structure):
    _fields_ = [
        ("count", _Int),
        ("bins_h", _Int * MOST_LEVELS),
        ("bins_w", _Int * MOST_LEVELS),
        ("first", _Int * (MOST_LEVELS + 1)),
    ]

    def __init__(self, bins: tuple[tuple[int, int], ...]) -> None:
        super().__init__(len(bins))
        for i, (h, w) in enumerate(bins):
            self.bins_h[i], self.bins_w[i] = h, w
            self.first[i + 1] = self.first[i] + h * w


class Image(ctypes.Structure):
    _fields_ = [("data", _Pointer), ("strides", _Long * 4)]

    def __init__(self, map: Tensor | None) -> None:
        super().__init__(*((map.data_ptr(), (_Long * 4)(*map.stride())) if map is not None else ()))


def _structure(*fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type("Args", (ctypes.Structure,), {"_fields_": list(fields)})


def _longs(names: str) -> list[tuple[str, type]]:
    return [(name, _Long) for name in names]


class Window(ctypes.Structure):
    _fields_ = [(name, _Int) for name in ("size_h", "size_w", "dilation_h", "dilation_w")]


_Weights, _Norms = _Pointer * MOST_LEVELS, (_Pointer * 4) * MOST_LEVELS
_MAP = [("dtype", _Int), ("channels_last", _Bool)]
_LEVELS = ("levels", Levels)
ARGS = {
    "pyramid_pool": _structure(
        *_MAP, *_longs("NCHW"), _LEVELS, ("input", Image), ("concat", Image), ("pooled", _Pointer),
        ("workspace", _Pointer),
    ),
    "pyramid_pool_backward": _structure(
        *_MAP, *_longs("NCHW"), _LEVELS, ("grad_pooled", _Pointer), ("grad_concat", Image), ("grad_input", Image)
    ),
    "pyramid_reduce": _structure(
        ("dtype", _Int), *_longs("NCR"), _LEVELS, ("pooled", _Pointer), ("weights", _Weights), ("norm", _Norms),
        ("norm_dtype", _Int), ("eps", _Double * MOST_LEVELS), ("relu", _Bool), ("reduced", _Pointer),
        ("workspace", _Pointer),
    ),
    "pyramid_reduce_backward": _structure(
        ("dtype", _Int), *_longs("NCR"), _LEVELS, ("grad_reduced", _Pointer), ("pooled", _Pointer),
        ("weights", _Weights), ("grad_pooled", _Pointer), ("grad_weights", _Pointer),
    ),
    "pyramid_upsample_concat": _structure(
        *_MAP, ("align_corners", _Bool), *_longs("NRHW"), _LEVELS, ("reduced", _Pointer), ("context", Image)
    ),
    "pyramid_upsample_concat_backward": _structure(
        *_MAP, ("align_corners", _Bool), *_longs("NRHW"), _LEVELS, ("grad_context", Image), ("grad_reduced", _Pointer),
        ("workspace", _Pointer),
    ),
    "pyramid_context": _structure(
        *_MAP, ("align_corners", _Bool), *_longs("NOHW"), _LEVELS, ("window", Window), ("taps", _Pointer),
        ("norm", _Pointer * 4), ("norm_dtype", _Int), ("eps", _Double), ("relu", _Bool), ("conv", Image),
    ),
    "pyramid_context_backward": _structure(
        *_MAP, ("align_corners", _Bool), *_longs("NOHW"), _LEVELS, ("window", Window), ("grad_conv", Image),
        ("grad_taps", _Pointer), ("workspace", _Pointer),
    ),
}  # fmt: skip


class Case:
    """One random choice of shapes, layout, dtype and bins."""

    def __init__(self, seed: int, library: ctypes.CDLL, largest: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.library = library
        self.dtype = self.random.choice(DTYPES)
        self.channels_last = self.random.random() < 0.5
        self.n = self.random.choice([0, 1, 2, 3])
        self.h, self.w = self.random.choice([size for size in SIZES if math.prod(size) <= largest])
        few = CHANNELS if self.h * self.w < 1000 else CHANNELS[:3]
        self.c, self.r = self.random.choice(few), self.random.choice(few)
        self.bins = self.random.choice(BINS if largest > 1000 else BINS[:5])
        self.cells = sum(h * w for h, w in self.bins)
        self.align_corners = self.random.random() < 0.5
        self.o, few_taps = self.r, self.cells > 100 or self.h * self.w > 1000
        self.kernel_size = self.random.choice([(1, 1), (3, 3)] if few_taps else [(1, 1), (3, 3), (5, 3)])
        self.dilation = self.random.choice([(1, 1), (2, 1), (5, 7)])

    def __repr__(self) -> str:
        return (
            f"N={self.n} C={self.c} R={self.r} H={self.h} W={self.w} bins={self.bins} {self.dtype} "
            f"channels_last={self.channels_last} align_corners={self.align_corners} "
            f"kernel_size={self.kernel_size} dilation={self.dilation}"
        )

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def nan(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=self.dtype)

    def map(self, channels: int) -> tuple[Tensor, Tensor]:
        """(a tensor of NaN, a part of it that is the map)."""
        layout = self.random.choice(LAYOUTS)
        n, c, h, w = self.n, channels, self.h, self.w
        around = {"dense": (0, 0, 0), "channels": (16, 0, 0), "slice": (3, 2, 3)}[layout]
        c_, h_, w_ = channels + around[0], h + around[1], w + around[2]
        # NHWC in memory, also where torch would not call it channels-last
        large = self.nan(n, h_, w_, c_).permute(0, 3, 1, 2) if self.channels_last else self.nan(n, c_, h_, w_)
        first, at = {"dense": (0, 0), "channels": (8, 0), "slice": (1, 1)}[layout]
        return large, large[:, first : first + c, at : at + h, at : at + w]

    def input(self, channels: int) -> Tensor:
        _, part = self.map(channels)
        return part.copy_(self.values(*part.shape))

    def call(self, op: str, **arguments: object) -> None:
        args = ARGS[op](dtype=DTYPES.index(self.dtype), levels=Levels(self.bins), N=self.n)
        for name, value in arguments.items():
            is_image = isinstance(getattr(args, name), Image)
            setattr(args, name, Image(value) if is_image else value.data_ptr() if isinstance(value, Tensor) else value)
        if hasattr(args, "workspace"):
            size = getattr(self.library, f"{op}_workspace")
            size.restype = ctypes.c_size_t
            workspace = torch.full((size(ctypes.byref(args)),), 0xFF, dtype=torch.uint8)  # NaN in every float type
            args.workspace = workspace.data_ptr()
        error = getattr(self.library, op)(ctypes.byref(args))
        assert error == 0, f"{op}: cudaError_t {error}"

    def map_call(self, op: str, channels: str, **arguments: object) -> None:
        sizes = {
            "H": self.h,
            "W": self.w,
            "channels_last": self.channels_last,
            channels: getattr(self, channels.lower()),
        }
        self.call(op, **sizes, **arguments)

    def check(self, name: str, actual: Tensor, expected: Tensor, scale: float = 1) -> None:
        assert not actual.isnan().any(), f"{name} has elements that were not written: {self}"
        if expected.numel() > 0:
            error, bound = (actual.double() - expected).abs().max().item(), max(1.0, expected.abs().max().item())
            assert error <= TOLERANCE[self.dtype] * scale * bound, f"{name} is off by {error}: {self}"

    def check_surroundings(self, name: str, large: Tensor, part: Tensor) -> None:
        assert large.isnan().sum() == large.numel() - part.numel(), f"{name} was written around: {self}"


def twice(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of a call; a second call must give the same bits."""
    first, second = [tuple(t.clone() for t in run()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two calls differ"
    return first


def check_pool(case: Case) -> None:
    x = case.input(case.c)
    large, concat = case.map(case.c)
    copies = case.random.random() < 0.7

    def run() -> tuple[Tensor, ...]:
        pooled = case.nan(case.n, case.cells, case.c)
        large.fill_(torch.nan)
        case.map_call("pyramid_pool", "C", input=x, concat=concat if copies else None, pooled=pooled)
        return pooled, *([concat] if copies else [])

    pooled, *copied = twice(run)
    if copies:
        assert torch.equal(copied[0], x), f"the copy differs: {case}"
        case.check_surroundings("concat", large, concat)
    if case.n > 0:
        case.check("pooled", pooled, reference.pyramid_pool(x.double(), case.bins))


def check_pool_backward(case: Case) -> None:
    grad_pooled, grad_concat = case.values(case.n, case.cells, case.c), case.input(case.c)
    adds = case.random.random() < 0.7
    large, grad_input = case.map(case.c)

    def run() -> tuple[Tensor, ...]:
        large.fill_(torch.nan)
        gradients = {"grad_pooled": grad_pooled, "grad_concat": grad_concat if adds else None, "grad_input": grad_input}
        case.map_call("pyramid_pool_backward", "C", **gradients)
        return (grad_input,)

    (actual,) = twice(run)
    case.check_surroundings("grad_input", large, grad_input)
    if case.n > 0:
        x = torch.zeros(grad_input.shape, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(reference.pyramid_pool(x, case.bins), x, grad_pooled.double())
        case.check("grad_input", actual, expected + grad_concat.double() if adds else expected, 2)


def check_reduce(case: Case) -> None:
    pooled = case.values(case.n, case.cells, case.c)
    weights = [case.values(case.r, case.c) / math.sqrt(case.c) for _ in case.bins]
    norm_dtype = case.random.choice([case.dtype, torch.float32])
    norm = [[case.values(case.r).abs().add(0.5).to(norm_dtype) for _ in range(4)] for _ in case.bins]
    normalises, affine, relu = (case.random.random() < 0.7 for _ in range(3))
    matrices, eps, pointers = _Weights(), (_Double * MOST_LEVELS)(), _Norms()
    for i in range(len(case.bins)):
        matrices[i], eps[i] = weights[i].data_ptr(), 1e-5 * (i + 1)
        for k in range(4):
            pointers[i][k] = norm[i][k].data_ptr() if normalises and (affine or k > 1) else None

    def run() -> tuple[Tensor, ...]:
        reduced = case.nan(case.n, case.cells, case.r)
        case.call(
            "pyramid_reduce", C=case.c, R=case.r, pooled=pooled, weights=matrices, norm=pointers,
            norm_dtype=DTYPES.index(norm_dtype), eps=eps, relu=relu, reduced=reduced,
        )  # fmt: skip
        return (reduced,)

    (actual,) = twice(run)
    parameters = [[t.double() if affine or k > 1 else None for k, t in enumerate(level)] for level in norm]
    folded = [(*level, eps[i]) for i, level in enumerate(parameters)] if normalises else None
    if case.n > 0:
        matrices_ = [weight.double() for weight in weights]
        case.check(
            "reduced",
            actual,
            reference.pyramid_reduce(pooled.double(), matrices_, case.bins, norm=folded, relu=relu),
            3,
        )


def check_reduce_backward(case: Case) -> None:
    pooled, grad_reduced = case.values(case.n, case.cells, case.c), case.values(case.n, case.cells, case.r)
    weights = [case.values(case.r, case.c) / math.sqrt(case.r) for _ in case.bins]
    matrices = _Weights(*[weight.data_ptr() for weight in weights])

    def run() -> tuple[Tensor, ...]:
        grad_pooled, grad_weights = torch.empty_like(pooled), case.nan(len(weights), case.r, case.c)
        grad_pooled.fill_(torch.nan)
        case.call(
            "pyramid_reduce_backward", C=case.c, R=case.r, grad_reduced=grad_reduced, pooled=pooled, weights=matrices,
            grad_pooled=grad_pooled, grad_weights=grad_weights,
        )  # fmt: skip
        return grad_pooled, grad_weights

    grad_pooled, grad_weights = twice(run)
    z, ws = pooled.double().requires_grad_(), [weight.double().requires_grad_() for weight in weights]
    expected = torch.autograd.grad(reference.pyramid_reduce(z, ws, case.bins), [z, *ws], grad_reduced.double())
    case.check("grad_pooled", grad_pooled, expected[0], 3)
    case.check("grad_weights", grad_weights, torch.stack(expected[1:]), 3)


def _upsampled(case: Case, reduced: Tensor) -> Tensor:
    context = torch.zeros(case.n, len(case.bins) * case.r, case.h, case.w, dtype=torch.float64)
    return reference.pyramid_upsample_concat_(context, reduced, case.bins, offset=0, align_corners=case.align_corners)


def _coordinates(case: Case) -> float:
    """How much float32 source coordinates, which grow with the bins, add to the error."""
    return 2 + max(case.h, case.w, *(max(level) for level in case.bins)) / 8 if case.dtype == torch.float32 else 2


def check_upsample_concat(case: Case) -> None:
    reduced = case.values(case.n, case.cells, case.r)
    large, context = case.map(len(case.bins) * case.r)

    def run() -> tuple[Tensor, ...]:
        large.fill_(torch.nan)
        case.map_call(
            "pyramid_upsample_concat", "R", reduced=reduced, context=context, align_corners=case.align_corners
        )
        return (context,)

    (actual,) = twice(run)
    case.check_surroundings("context", large, context)
    if case.n > 0:
        case.check("context", actual, _upsampled(case, reduced.double()), _coordinates(case))


def check_upsample_concat_backward(case: Case) -> None:
    grad_context = case.input(len(case.bins) * case.r)

    def run() -> tuple[Tensor, ...]:
        grad_reduced = case.nan(case.n, case.cells, case.r)
        case.map_call(
            "pyramid_upsample_concat_backward", "R", grad_context=grad_context, grad_reduced=grad_reduced,
            align_corners=case.align_corners,
        )  # fmt: skip
        return (grad_reduced,)

    (actual,) = twice(run)
    if case.n > 0:
        z = torch.zeros(case.n, case.cells, case.r, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(_upsampled(case, z), z, grad_context.double())
        case.check("grad_reduced", actual, expected, _coordinates(case))


def _context(case: Case, conv: Tensor, taps: Tensor, **more: object) -> Tensor:
    settings = {"dilation": case.dilation, "align_corners": case.align_corners}
    return reference.pyramid_context_(conv, taps, case.bins, case.kernel_size, **settings, **more)


def check_context(case: Case) -> None:
    taps = case.values(case.n, case.cells, math.prod(case.kernel_size), case.o)
    before = case.values(case.n, case.o, case.h, case.w)
    large, conv = case.map(case.o)
    normalises, relu = (case.random.random() < 0.5 for _ in range(2))
    norm_dtype = case.random.choice([case.dtype, torch.float32])
    norm = [case.values(case.o).abs().add(0.5).to(norm_dtype) for _ in range(4)]
    pointers = (_Pointer * 4)(*[t.data_ptr() if normalises else None for t in norm])

    def run() -> tuple[Tensor, ...]:
        large.fill_(torch.nan)
        conv.copy_(before)
        case.map_call(
            "pyramid_context", "O", conv=conv, taps=taps, window=Window(*case.kernel_size, *case.dilation), eps=0.1,
            norm=pointers, norm_dtype=DTYPES.index(norm_dtype), relu=relu, align_corners=case.align_corners,
        )  # fmt: skip
        return (conv,)

    (actual,) = twice(run)
    case.check_surroundings("conv", large, conv)
    if case.n > 0:
        folded = (*(t.double() for t in norm), 0.1) if normalises else None
        expected = _context(case, before.double(), taps.double(), norm=folded, relu=relu)
        case.check("conv", actual, expected, 2 * _coordinates(case))


def check_context_backward(case: Case) -> None:
    grad_conv = case.input(case.o)

    def run() -> tuple[Tensor, ...]:
        grad_taps = case.nan(case.n, case.cells, math.prod(case.kernel_size), case.o)
        case.map_call(
            "pyramid_context_backward", "O", grad_conv=grad_conv, window=Window(*case.kernel_size, *case.dilation),
            grad_taps=grad_taps, align_corners=case.align_corners,
        )  # fmt: skip
        return (grad_taps,)

    (actual,) = twice(run)
    if case.n > 0:
        taps = torch.zeros(actual.shape, dtype=torch.float64, requires_grad=True)
        zeros = torch.zeros(grad_conv.shape, dtype=torch.float64)
        (expected,) = torch.autograd.grad(_context(case, zeros, taps), taps, grad_conv.double())
        case.check("grad_taps", actual, expected, 2 * _coordinates(case))


CHECKS = [
    check_context,
    check_context_backward,
    check_pool,
    check_pool_backward,
    check_reduce,
    check_reduce_backward,
    check_upsample_concat,
    check_upsample_concat_backward,
]


def check(library: Path, cases: int, seed: int, largest: int) -> None:
    """Every check on `cases` random cases with images of at most `largest` pixels."""
    loaded = ctypes.CDLL(str(library))
    for number in range(cases):
        for run in CHECKS:
            run(Case(1000 * seed + number, loaded, largest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=200, help="pixels of an image at most")
    parser.add_argument("--sanitizer", choices=list(backend.SANITIZERS), default="none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check(backend.build_operators(args.sanitizer), args.cases, args.seed, args.largest)
    print(f"contract: {args.cases} cases of {len(CHECKS)} kernels, sanitizer {args.sanitizer}: right")


if __name__ == "__main__":
    main()
