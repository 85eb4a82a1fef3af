"""What a benchmark is: a case, the step that a provider runs of it, and the feature maps it runs on."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pspnet_fast.bench.timing import nothing

SUITES = ("ops", "head", "upsampled", "loss", "model", "train")
LAYOUTS = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Where a call's own time is most of all: few channels, and logits of 19 classes, to eight times their size.
SMALL, SMALL_LOGITS = (1, 64, 16, 16), (1, 19, 16, 16)

F = TypeVar("F", bound=Callable[..., Any])
Compiler = Callable[[F], F]  # torch.compile, or what leaves a function as it is
Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Step:
    """What is timed, and the least that has to be done for it.

    Args:
        call: one step; what it returns is ignored.
        floor_bytes: what has to be read and written once, at least.
        operations: additions, multiplications and exponentials, at least, each counted as one.
        setup: runs before each call, untimed.
    """

    call: Callable[[], object]
    floor_bytes: int
    operations: int = 0
    setup: Callable[[], None] = nothing


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Args:
        suite: one of SUITES.
        group: the operator or module, which `pytest benchmarks` names a file by.
        table: the title of its table.
        name: its row.
        dtype: of the matrix products that its operations are held against.
        make: (device, ours, compiler) -> the step of the package or of plain torch, its functions given to the
            compiler. It can be pickled, as another process measures the memory.
        target: how many times faster than plain torch it is meant to be.
        standard: part of a run that asks for no case by name.
        quick: part of `--quick` too.
        compiles: torch.compile takes no more than some 20 s on a CPU, so that a run tries it unasked.
        stock: the device -> the module of plain torch and its input, for runtimes that read an exported graph; None
            where there is no such graph, as in training.
    """

    suite: str
    group: str
    table: str
    name: str
    dtype: torch.dtype
    make: Callable[[torch.device, bool, Compiler], Step]
    target: float | None = None
    standard: bool = False
    quick: bool = False
    compiles: bool = False
    stock: Callable[[torch.device], tuple[nn.Module, Tensor]] | None = None

    def __str__(self) -> str:
        return f"{self.table}: {self.name}"


@dataclass(frozen=True)
class Map:
    """A feature map (N, C, H, W) of one dtype and memory format."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {dtype_name(self.dtype)} {LAYOUTS[self.memory_format]}"

    @property
    def small(self) -> bool:
        """One of the two whose host time counts."""
        return self.shape in (SMALL, SMALL_LOGITS)

    @property
    def usual(self) -> bool:
        """One of the two that stand for all four: float32 as torch lays maps out, bfloat16 as GPUs prefer them."""
        return (self.dtype == torch.float32) == (self.memory_format == torch.contiguous_format)

    @property
    def first(self) -> bool:
        """float32, contiguous."""
        return self.usual and self.dtype == torch.float32

    def random(self, device: torch.device, channels: int | None = None) -> Tensor:
        """(N, C, H, W), or other channels than C."""
        n, c, h, w = self.shape
        size = (n, channels or c, h, w)
        return torch.empty(size, dtype=self.dtype, device=device, memory_format=self.memory_format).normal_()


def maps(device: torch.device, *shapes: tuple[int, int, int, int]) -> list[Map]:
    """The shapes in both dtypes and both memory formats; on a GPU, those of batch 1 with a batch of 16 as well."""
    if device.type == "cuda":
        shapes += tuple((16, *shape[1:]) for shape in shapes if shape[0] == 1)
    return [Map(shape, dtype, layout) for shape in shapes for dtype in DTYPES.values() for layout in LAYOUTS]


def convolves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether convolutions of a dtype take no longer than in float32.

    A CPU without instructions for bfloat16 takes minutes for the gradients of one that takes 2 s in float32.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # no public interface
        return False


def upsampled_size(map: Map) -> tuple[int, int]:
    """Of the map that its logits become: of a crop for training, or 128x128 from small ones."""
    return (128, 128) if map.small else (473, 473)


def dtype_name(dtype: torch.dtype) -> str:
    """Without torch's name before it."""
    return str(dtype).removeprefix("torch.")


def nbytes(*tensors: Tensor) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def step_of(
    function: Callable[[], Any], direction: Direction, inputs: Sequence[Tensor], floor_bytes: int, operations: int
) -> Step:
    """A function's forward pass without gradients, or its backward pass alone."""
    if direction == "forward":
        return Step(torch.no_grad()(function), floor_bytes, operations)
    for leaf in inputs:
        leaf.requires_grad_()
    result = function()
    outputs = [result] if isinstance(result, Tensor) else list(result)
    grads = [torch.randn_like(output) for output in outputs]
    return Step(lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True), floor_bytes, operations)


def training_step(
    module: Callable[..., Tensor], layers: nn.Module, argument: Any, inputs: Sequence[Tensor], least: tuple[int, int]
) -> Step:
    """Forward and backward of ``module(argument)``, the gradients forgotten before each.

    Args:
        layers: whose parameters get gradients.
        inputs: the tensors of the argument, which get gradients.
        least: bytes and operations.
    """
    for leaf in inputs:
        leaf.requires_grad_()
    with torch.no_grad():
        grad = torch.randn_like(module(argument))

    def forget_gradients() -> None:
        layers.zero_grad(set_to_none=True)
        for leaf in inputs:
            leaf.grad = None

    return Step(lambda: module(argument).backward(grad), *least, setup=forget_gradients)


def all_cases(device: torch.device) -> list[Case]:
    """Every case of every suite, in SUITES' order."""
    from pspnet_fast.bench import head, loss, network, ops, upsampled

    return [case for suite in (ops, head, upsampled, loss, network) for case in suite.cases(device)]


def select(
    cases: Sequence[Case], suite: str = "all", dtype: str | None = None, pattern: str | None = None, quick: bool = False
) -> list[Case]:
    """Those that a run measures.

    Args:
        suite: one of SUITES, or "all".
        dtype: only this one; None is any.
        pattern: a regular expression found in "table: name", without regard to case. It chooses from all cases, where
            a run without a pattern has the standard ones, or with ``quick`` the quick ones.
        quick: only the quick ones.

    Raises:
        ValueError: the pattern is no regular expression, or there is no such case.
    """
    try:
        found = re.compile(pattern or "", re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"--case {pattern!r} is no regular expression: {error}") from None
    chosen = [
        case
        for case in cases
        if suite in (case.suite, "all")
        and (dtype is None or case.dtype == DTYPES[dtype])
        and found.search(str(case))
        and (case.quick if quick else case.standard or pattern is not None)
    ]
    if not chosen:
        raise ValueError("no case is left to measure: --list shows all")
    return chosen
