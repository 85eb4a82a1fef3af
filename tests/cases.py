"""Shapes, layouts and the measure of accuracy that the operators' tests share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pspnet_fast import ops

OPERATORS = [name for name in ops.__all__ if name not in ("new_concat", "keep_memory")]  # these are about memory alone
WITHOUT_TENSORS = {"build_info", "cpu_instruction_set", "keep_memory"}  # of what the library registers
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "slice", "channels_last_slice", "transposed"]
BINS = [
    (1, 2, 3, 6),
    (1,),
    (2, 4),
    (1, 3, 6, 8),
    ((2, 5), 3),  # pairs
    (9, 1),  # many bins
]
SIZES = [
    (1, 1),  # fewer pixels than bins
    (3, 2),
    (7, 7),
    (13, 9),  # bins overlap
    (60, 60),  # a 473 x 473 crop
    (61, 97),  # odd, not square
]
CHANNELS = 19  # no multiple of any vector
LAYOUTS_AND_CHANNELS = [("contiguous", 19), ("channels_last", 19), ("channels_last", 24)]  # 24: of every 16-byte vector
# size of a map, levels of many cells (of more than the map has pixels, too), channels, kernel_size, dilation
MANY_CELLS = [
    ((26, 37), ((13, 19), (7, 9)), 21, 3, 1),
    ((9, 20), ((17, 25), (9, 20)), 37, (5, 3), (2, 1)),
    ((21, 16), ((21, 16), 1), 70, 1, 1),
]
SEED: int | None = None  # of pytest --sample


def make_smaller() -> None:
    """Fewer pixels and channels, of the same variety: for runs under sanitizers."""
    SIZES[SIZES.index((60, 60))] = (20, 20)
    MANY_CELLS[:] = [
        ((9, 11), ((5, 7), (3, 4)), 5, 3, 1),
        ((4, 7), ((6, 9), (4, 7)), 8, (5, 3), (2, 1)),
        ((7, 6), ((7, 6), 1), 6, 1, 1),
    ]
    LAYOUTS_AND_CHANNELS[:] = [("contiguous", 5), ("channels_last", 5), ("channels_last", 8)]


def count(bins: Sequence[int | tuple[int, int]]) -> int:
    """The cells of all levels together."""
    return sum(b * b if isinstance(b, int) else b[0] * b[1] for b in bins)


def make(shape: Sequence[int], layout: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Random values in a layout; slices lie at odd offsets inside larger tensors that hold NaN around them."""
    n, c, h, w = shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)
    if layout == "contiguous":
        return values
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    large = torch.full((n + 1, c + 3, h + 2, w + 1), torch.nan, dtype=dtype, device=device)
    if layout == "channels_last_slice":
        large = large.contiguous(memory_format=torch.channels_last)
    part = large[1:, 1 : c + 1, 2:, 1:]
    part.copy_(values)
    return part


def errors(function: Callable[..., Sequence[Tensor]], eager: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]):
    """(error, eager's error, largest result, largest sum of the terms' magnitudes), against eager in float64."""
    exact, terms = eager(*[t.double() for t in inputs]), eager(*[t.double().abs() for t in inputs])
    for ours, stock, truth, sums in zip(function(*inputs), eager(*inputs), exact, terms, strict=True):
        assert ours.shape == truth.shape
        assert ours.dtype == inputs[0].dtype
        if truth.numel() == 0:
            continue
        error, stock_error = ((t.double() - truth).abs().max().item() for t in (ours, stock))
        yield error, stock_error, truth.abs().max().item(), sums.max().item()


def assert_accurate(
    function: Callable[..., Sequence[Tensor]], eager: Callable[..., Sequence[Tensor]], *inputs: Tensor
) -> None:
    """Asserts that the error against float64 is at most twice that of eager PyTorch in the same dtype.

    Where eager happens to be exact, one rounding of the result is allowed, and a quarter of one of its terms while they
    are summed in float32. In float64 eager is the truth itself: there only the order of operations may show.
    """
    dtype = inputs[0].dtype
    for error, stock, result, terms in errors(function, eager, inputs):
        if dtype == torch.float64:
            assert error <= 64 * torch.finfo(dtype).eps * max(result, terms), (error, result, terms)
        else:
            summing = torch.finfo(torch.float32).eps * terms / 4
            assert error <= 2 * stock + torch.finfo(dtype).eps * result + summing, (error, stock, result, terms)


def with_gradients(function: Callable[..., Tensor], needs: int) -> Callable[..., list[Tensor]]:
    """The results of a function and its gradients, from arguments (inputs..., output gradient)."""

    def run(*arguments: Tensor) -> list[Tensor]:
        inputs = [t.detach().requires_grad_(i < needs) for i, t in enumerate(arguments[:-1])]
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs[:needs], arguments[-1].to(output.dtype))]

    return run
