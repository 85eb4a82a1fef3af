"""Calls operators through torch.ops with arguments that nobody should give: `hostile_arguments.py [OPERATOR ...]`.

They may raise, with a sentence; they may not end the process, nor write outside their arguments. Each runs in a process
of its own, since what is tested for would end it; prints what failed. `--cuda-on-cpu` runs the CUDA sources in place of
the CPU kernels.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import pspnet_fast.ops  # noqa: F401  (loads the operators)

MOST_MEMORY = 1 << 28  # of outputs, beyond what the process has: what asks for more is refused, not computed
BORDER = 256
SIZES = [2**22, 2**40]  # of maps expanded from one element

_buffers: list[Tensor] = []


def place(values: Tensor) -> Tensor:
    """The same values in a buffer with a border that nothing may write to."""
    if values.dtype == torch.bool or values.numel() == 0:
        return values
    buffer = torch.full((values.numel() + 2 * BORDER,), 77).to(values.dtype)
    inside = buffer[BORDER:-BORDER].view(values.shape)
    inside.copy_(values)
    _buffers.append(buffer)
    return inside


def check_borders() -> None:
    for buffer in _buffers:
        for border in (buffer[:BORDER], buffer[-BORDER:]):
            assert (border == 77).all(), "written outside a tensor"
    _buffers.clear()


F, I = torch.float32, torch.int64  # noqa: E741
BINS = [1, 1, 2, 2]  # 5 cells
SOUND: dict[str, list[tuple[str, Any]]] = {
    "new_concat": [("map", (2, 4, 6, 5)), ("int", 8)],
    "pyramid_pool": [("map", (2, 4, 6, 5)), ("map", (2, 8, 6, 5)), ("int", 4), ("bins", BINS)],
    "pyramid_pool_alone": [("map", (2, 4, 6, 5)), ("bins", BINS)],
    "pyramid_pool_backward": [
        ("map", (2, 5, 4)),
        ("map", (2, 8, 6, 5)),
        ("int", 4),
        ("bins", BINS),
        ("int", 6),
        ("int", 5),
        ("bool", True),
    ],
    "pyramid_reduce": [
        ("map", (2, 5, 4)),
        ("maps", [(3, 4)] * 2),
        ("maps", [(3,)] * 8),
        ("floats", [1e-5] * 2),
        ("bool", True),
        ("bins", BINS),
    ],
    "pyramid_reduce_backward": [("map", (2, 5, 3)), ("map", (2, 5, 4)), ("maps", [(3, 4)] * 2), ("bins", BINS)],
    "pyramid_batch_norm": [
        ("map", (2, 5, 3)),
        *(("maps", [(3,)] * 2) for _ in range(4)),
        ("pair", [1, 0]),
        ("floats", [0.1] * 2),
        ("floats", [1e-5] * 2),
        ("bool", True),
        ("bins", BINS),
    ],
    "pyramid_batch_norm_backward": [
        ("map", (2, 5, 3)),
        ("map", (2, 5, 3)),
        ("map", (2, 5, 3)),
        ("maps", [(3,)] * 2),
        ("map", (2, 2, 3)),
        ("pair", [1, 0]),
        ("floats", [1e-5] * 2),
        ("bins", BINS),
    ],
    "pyramid_split_weight": [("map", (3, 8, 3, 2)), ("int", 4), ("bool", True), ("int", 2), ("dtype", F)],
    "pyramid_split_weight_backward": [
        ("map", (3, 4, 3, 2)),
        ("map", (2, 18, 2)),
        ("bool", True),
        ("bool", True),
        ("dtype", F),
    ],
    "pyramid_upsample_concat_": [
        ("map", (2, 10, 6, 5)),
        ("map", (2, 5, 3)),
        ("int", 4),
        ("bins", BINS),
        ("bool", True),
    ],
    "pyramid_upsample_concat_backward": [
        ("map", (2, 10, 6, 5)),
        ("int", 4),
        ("int", 3),
        ("bins", BINS),
        ("bool", True),
    ],
    "pyramid_context_": [
        ("map", (2, 4, 6, 5)),
        ("map", (2, 5, 9, 4)),
        ("maps", [(4,)] * 4),
        ("float", 1e-5),
        ("bool", True),
        ("bins", BINS),
        ("pair", [3, 3]),
        ("pair", [1, 1]),
        ("int", 1),
        ("bool", True),
    ],
    "pyramid_context_backward": [
        ("map", (2, 4, 6, 5)),
        ("bins", BINS),
        ("pair", [3, 3]),
        ("pair", [1, 1]),
        ("int", 1),
    ],
    "upsample_argmax": [("map", (2, 4, 6, 5)), ("int", 9), ("int", 8), ("bool", True), ("bool", True)],
    "upsample_softmax_accumulate_": [
        ("map", (2, 4, 9, 8)),
        ("map", (2, 4, 3, 3)),
        ("int", 2),
        ("int", 1),
        ("int", 5),
        ("int", 6),
        ("bool", True),
        ("bool", True),
        ("float", 1.0),
    ],
    "confusion_matrix_": [("labels", (3, 3)), ("labels", (2, 6, 5)), ("labels", (2, 6, 5)), ("int", 255)],
    "upsample_cross_entropy": [
        ("map", (2, 4, 3, 3)),
        ("labels", (2, 6, 5)),
        ("map", (4,)),
        ("bool", True),
        ("int", 255),
        ("float", 0.1),
        ("int", 1),
    ],
    "upsample_cross_entropy_backward": [
        ("map", ()),
        ("map", (2, 4, 3, 3)),
        ("labels", (2, 6, 5)),
        ("map", (4,)),
        ("map", (2, 6, 5)),
        ("map", ()),
        ("bool", True),
        ("int", 255),
        ("float", 0.1),
        ("int", 1),
    ],
}
INTS = [-(2**63), -(2**62), -1, 0, 1, 7, 2**31 - 1, 2**31, 2**32 + 4, 2**61, 2**62, 2**62 + 2**22, 2**63 - 4, 2**63 - 1]
HOSTILE: dict[str, list[Any]] = {
    "int": INTS,
    "bool": [False],
    "dtype": [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64],
    "float": [float("nan"), float("inf"), -1.0, 1e300],
    "floats": [[], [float("nan")] * 2, [0.0], [0.0] * 17],
    "pair": [[], [3], [3, 3, 3], [0, 0], [2, 2], [-1, 1], [2**31 + 1] * 2, [2**63 - 1] * 2, [4097, 1], [4095, 4095]],
    "bins": [
        [],
        [1],
        [0, 0],
        [-1, 1],
        [1, 1] * 17,
        [4096, 64],
        [4097, 1],
        [4096, 4096, 1, 1],
        [2**63 - 1, 2**63 - 1],
        [2**32 + 1, 1, 2, 2],
        [1, 1, 2],
        [1, 1],
        [3, 3, 2, 2],
    ],
}


def hostile_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Makers of tensors that differ from the shape and dtype wanted, one by one, or lie strangely in memory."""

    def make(sizes: tuple[int, ...], kind: torch.dtype = dtype) -> Tensor:
        return place(torch.ones(sizes).to(kind))

    def resized(d: int, size: int) -> tuple[int, ...]:
        return (*shape[:d], size, *shape[d + 1 :])

    for rank in range(7):
        yield lambda rank=rank: make((2,) * rank)
    for d in range(len(shape)):
        for size in (0, 1, shape[d] + 1):
            yield lambda d=d, size=size: make(resized(d, size))
        for size in SIZES:
            # one place for all: as large as it says to whoever counts, else a few bytes
            yield lambda d=d, size=size: torch.zeros(resized(d, 1), dtype=dtype).expand(resized(d, size))
            if len(shape) > 1:
                empty = list(shape)
                empty[d - 1], empty[d] = 0, size
                yield lambda empty=tuple(empty): make(empty)
    yield lambda: torch.zeros(0, dtype=dtype).as_strided((0, 2**62, *shape[2:]), (0,) * max(2, len(shape)))
    for kind in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64):
        yield lambda kind=kind: make(shape, kind)
    yield lambda: torch.zeros(shape, dtype=dtype, device="meta")
    yield lambda: torch.zeros(shape, dtype=dtype).to_sparse()
    yield lambda: torch.zeros((), dtype=dtype).expand(shape)
    yield lambda: torch.zeros(4096, dtype=dtype).as_strided(shape, (1,) * len(shape))
    yield lambda: torch.zeros(4096, dtype=dtype).as_strided(shape, (3, 1, 2, 5)[: len(shape)])
    if len(shape) > 1:
        yield lambda: make(shape[::-1]).permute(*reversed(range(len(shape))))
        yield lambda: make(shape).transpose(-1, -2)
    if len(shape) == 4:
        yield lambda: make(shape).contiguous(memory_format=torch.channels_last)
    yield lambda: make(shape) * float("nan") if dtype.is_floating_point else make(shape) * 2**62


def sound(kind: str, value: Any) -> Any:
    if kind == "map":
        return place(torch.randn(value))
    if kind == "maps":
        return [place(torch.rand(shape)) for shape in value]
    if kind == "labels":
        return place(torch.zeros(value, dtype=I))
    return value


def hostile(kind: str, value: Any) -> list[Callable[[], Any]]:
    if kind in ("map", "labels"):
        makers = list(hostile_tensors(value, F if kind == "map" else I))
        return makers
    if kind == "maps":
        one = [
            lambda i=i, maker=maker: [maker() if j == i else sound("map", s) for j, s in enumerate(value)]
            for i in (0, len(value) - 1)
            for maker in hostile_tensors(value[0], F)
        ]
        return [lambda: [], lambda: [sound("map", value[0])], lambda: [sound("map", value[0])] * 17, *one]
    return [lambda value=value: value for value in HOSTILE[kind]]


def calls(name: str, pairs: int) -> Iterator[list[Any]]:
    arguments = SOUND[name]
    makers = [hostile(*argument) for argument in arguments]
    for i in range(len(arguments)):
        for maker in makers[i]:
            yield [maker() if j == i else sound(*argument) for j, argument in enumerate(arguments)]
    choice = random.Random(0)
    for _ in range(pairs):  # two at once
        chosen = choice.sample(range(len(arguments)), min(2, len(arguments)))
        picked = {i: choice.choice(makers[i]) for i in chosen}
        yield [picked[j]() if j in picked else sound(*argument) for j, argument in enumerate(arguments)]


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{value.dtype} {tuple(value.shape)} {strides} {value.device}"
    return f"[{', '.join(map(describe, value))}]" if isinstance(value, list) else repr(value)


def try_operator(name: str, pairs: int) -> str:
    """Calls it in a fork of this process, which has not used a thread yet; what was wrong, or nothing."""
    with tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                call_hostilely(name, pairs)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        lines = log.read().splitlines() or ["no call"]
    if status != 0:
        return f"{name}: status {status} at the last of these calls\n" + "\n".join(lines[-20:])
    raised = int(lines[-1].removeprefix("raised "))
    return "" if raised > 20 else f"{name}: only {raised} calls raised, its arguments are not hostile"


def call_hostilely(name: str, pairs: int) -> None:
    torch.set_num_threads(2)
    operator = getattr(torch.ops.pspnet_fast, name)
    operator(*itertools.starmap(sound, SOUND[name]))
    check_borders()
    with open("/proc/self/statm") as pages:
        used = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY,) * 2)
    raised = 0
    for arguments in calls(name, pairs):
        print(describe(arguments), flush=True)  # the last line tells what ended the process
        message = ""
        try:
            operator(*arguments)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            message = str(error)
            raised += 1
        # torch's own, of a kind of tensor that has no kernel, lists files of torch
        path = re.search(r"(?<!torch/)csrc/(cpu/|cuda/)?\w+\.\w+|API call failed", message)
        assert path is None, message
        check_borders()
    print(f"raised {raised}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("operators", nargs="*", choices=[*SOUND, []], metavar="OPERATOR", help="all if none is named")
    parser.add_argument("--cuda-on-cpu", action="store_true")
    parser.add_argument("--pairs", type=int, default=80)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.cuda_on_cpu:
            from cuda_on_cpu import backend

            SIZES.remove(2**22)  # each of these takes minutes
            HOSTILE["bins"].remove([4096, 64])
            stack.enter_context(backend.instead_of_cpu_kernels())
        wrong = [found for name in options.operators or SOUND if (found := try_operator(name, options.pairs))]
    sys.exit("\n\n".join(wrong) or None)


if __name__ == "__main__":
    main()
