"""What the property tests draw, and how they judge results: bounds of rounding around the float64 reference.

PSPNET_FAST_PROPERTIES=more draws twenty times as many, others in every run, on all devices; --sample the first quarter.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MORE = os.environ.get("PSPNET_FAST_PROPERTIES") == "more"
EXAMPLES = {  # of each property
    "test_pyramid_pool": 250,
    "test_pyramid_reduce": 200,
    "test_pyramid_batch_norm": 100,
    "test_pyramid_split_weight": 100,
    "test_pyramid_upsample_concat": 250,
    "test_pyramid_context": 250,
    "test_upsample_argmax": 200,
    "test_upsample_softmax_accumulate": 200,
    "test_upsample_cross_entropy": 300,
    "test_confusion_matrix": 150,
    "test_shared_memory": 200,
    "test_invalid_arguments": 300,
    "test_fused_ppm": 100,
    "test_fused_psp_head": 100,
    "test_upsample_cross_entropy_loss": 100,
    "test_fuse": 150,
}
FOUND: set[str] = set()  # the properties that the imported test modules define

settings.register_profile(
    "pspnet_fast",
    derandomize=not MORE,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("pspnet_fast")


def holds_for_all(test: Callable[..., None]) -> Callable[..., None]:
    """A property: test(draw, ...) for as many examples as the table says, each in a Draw of its own."""
    FOUND.add(test.__name__)
    count = EXAMPLES[test.__name__] * (20 if MORE else 1) // (1 if cases.SEED is None else 4)

    @pytest.mark.parametrize("device", ["cpu", "cuda_on_cpu", "cuda"] if MORE else ["cpu"], indirect=True)
    @settings(max_examples=count)
    @given(data=st.data())
    def run(device: torch.device, data: Any) -> None:
        test(Draw(data, device))

    run.__name__ = run.__qualname__ = test.__name__
    run.__doc__ = test.__doc__
    run.__module__ = test.__module__
    return run


# ---- what is drawn -----------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FINITE = ["normal", "integers", "huge and tiny", "one value"]
ANY = [*FINITE, "not finite"]
HUGE = {torch.float16: 3e4, torch.bfloat16: 1e30, torch.float32: 1e30, torch.float64: 1e30}
DENORMAL = {torch.float16: 1e-7, torch.bfloat16: 1e-40, torch.float32: 1e-40, torch.float64: 1e-310}


class Draw:
    """Draws of one example, and the memory that its tensors lie in."""

    def __init__(self, data: Any, device: torch.device) -> None:
        self.data, self.device = data, device
        self.buffers: list[Tensor] = []

    def integer(self, least: int, most: int) -> int:
        return self.data.draw(st.integers(least, most))

    def choice(self, values: Sequence[Any]) -> Any:
        return self.data.draw(st.sampled_from(values))

    def flag(self) -> bool:
        return self.data.draw(st.booleans())

    def size(self, most: int = 9) -> tuple[int, int]:
        return self.data.draw(st.tuples(st.integers(1, most), st.integers(1, most)))

    def bins(self, levels: int = 3, most: int = 6) -> tuple[Any, ...]:
        one = st.integers(1, most)
        return tuple(self.data.draw(st.lists(st.one_of(one, st.tuples(one, one)), min_size=1, max_size=levels)))

    def values(self, shape: Sequence[int], dtype: torch.dtype, kinds: Sequence[str] = FINITE) -> Tensor:
        kind, seed = self.data.draw(st.tuples(st.sampled_from(kinds), st.integers(0, 999)))
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        if kind == "integers":
            values = values.round()
        elif kind == "one value":
            values = values.flatten()[:1].sum().expand(tuple(shape))
        elif kind != "normal":
            tiny, huge, inf = DENORMAL[dtype], HUGE[dtype], torch.inf
            extremes = (
                [tiny, -tiny, huge, -huge, 0.0, -0.0] if kind == "huge and tiny" else [inf, -inf, torch.nan, huge]
            )
            chosen = torch.rand(tuple(shape), generator=generator) < [0.03, 0.2, 0.6][seed % 3]
            which = torch.randint(len(extremes), tuple(shape), generator=generator)
            values = torch.where(chosen, torch.tensor(extremes, dtype=torch.float64)[which], values)
        return values.to(dtype)

    def place(self, values: Tensor, layouts: Sequence[str] | None = None) -> Tensor:
        """The values in a buffer of their own, of drawn strides; others lie between and around them."""
        rank = values.dim()
        names = ["contiguous", "channels last", "channels", "channels of channels last", "any", "expanded"]
        layout = self.choice(layouts or (names if rank == 4 else ["contiguous", "any", "expanded"]))
        order, gaps, still = list(range(rank)), [0] * rank, []
        if "channels last" in layout:
            order = [0, 2, 3, 1]
        if layout.startswith("channels") and layout != "channels last":
            gaps[1] = 3
        if layout in ("any", "expanded"):
            order = self.data.draw(st.permutations(order))
            gaps = self.data.draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
        if layout == "expanded" and rank > 0:
            still = [self.integer(0, rank - 1)]
        offset = self.choice([0, 0, 1, 3])
        strides, step = [0] * rank, 1
        for axis in reversed(order):
            if axis not in still:
                strides[axis] = step
                step *= values.size(axis) + gaps[axis]
        for axis in still:
            values = values.narrow(axis, 0, min(1, values.size(axis))).expand(values.shape)
        buffer = torch.full((offset + max(step, 1),), 77.0).to(self.device, values.dtype)
        self.buffers.append(buffer)
        tensor = buffer.as_strided(values.shape, strides, offset)
        part = tensor
        for axis in still:
            part, values = (t.narrow(axis, 0, min(1, t.size(axis))) for t in (part, values))
        part.copy_(values)
        return tensor

    def tensor(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        kinds: Sequence[str] = FINITE,
        layouts: Sequence[str] | None = None,
    ) -> Tensor:
        return self.place(self.values(shape, dtype, kinds), layouts)

    def compute(self, function: Callable[[], Sequence[Tensor]], written: Tensor | None = None) -> list[Tensor]:
        """The results; twice with the same bits, and nothing changed but what is to be written. Undoes the writing."""
        before = [b.clone() for b in self.buffers]
        results = []
        for _ in range(2):
            results.append([r.detach().clone() for r in function()])
            for buffer, old in zip(self.buffers, before, strict=True):
                if written is not None and written.data_ptr() and _lies_in(written, buffer):
                    old = old.clone()
                    shape, strides, offset = written.shape, written.stride(), written.storage_offset()
                    old.as_strided(shape, strides, offset).copy_(written)
                assert torch.equal(bits(buffer), bits(old)), "changed what it only reads"
            for buffer, old in zip(self.buffers, before, strict=True):
                buffer.copy_(old)
        for first, second in zip(*results, strict=True):
            assert torch.equal(bits(first), bits(second)), "other bits in a second call"
        return results[0]


def _lies_in(tensor: Tensor, buffer: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def bits(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten()).view(torch.uint8)


# ---- how it is judged --------------------------------------------------------------------------------------------


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(dtype: torch.dtype) -> float:
    """The greatest relative error of one rounding in the arithmetic for a dtype.

    In float64 the reference rounds as well: twice.
    """
    return torch.finfo(torch.float64).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps / 2


def least(dtype: torch.dtype) -> float:
    """The greatest absolute error of one rounding near 0."""
    return torch.finfo(accumulator(dtype)).smallest_normal * unit(dtype) * 2


def assert_within(
    ours: Tensor, truth: Tensor, slack: Tensor, sure: Tensor | None = None, other: Tensor | None = None
) -> None:
    """ours lies between the roundings of truth - slack and truth + slack, and is infinite or NaN where truth is.

    Args:
        sure: where this is to hold, by default everywhere.
        other: another truth, right as well where the first is not finite.
    """
    assert ours.shape == truth.shape
    sure = torch.ones_like(truth, dtype=torch.bool) if sure is None else sure
    slack = slack.nan_to_num(torch.inf, torch.inf)
    right = _lies_within(ours, truth, slack)
    if other is not None:
        right |= ~truth.isfinite() & _lies_within(ours, other, slack)
    if not (right | ~sure).all():
        place = tuple((~right & sure).nonzero()[0].tolist())
        wrong = int((~right & sure).sum())
        raise AssertionError(
            f"{wrong} of {ours.numel()} wrong; at {place} {ours[place].item()!r} and not {truth[place].item()!r} "
            f"+- {slack[place].item():.3g}"
        )


def _lies_within(ours: Tensor, truth: Tensor, slack: Tensor) -> Tensor:
    low, high = (truth - slack).to(ours.dtype), (truth + slack).to(ours.dtype)
    near = torch.where(truth.isfinite(), (low <= ours) & (ours <= high), ours.double() == truth)
    return near | (truth.isnan() & ours.isnan())


def kinds(tensor: Tensor) -> Tensor:
    """0 for a number, 1 and -1 for infinity, 2 for NaN."""
    return torch.where(tensor.isnan(), 2, torch.where(tensor.isinf(), tensor.sign(), 0).nan_to_num(0))


def magnitude(tensor: Tensor) -> Tensor:
    """Magnitudes in float64, of what is finite."""
    return tensor.double().abs().nan_to_num(0, 0, 0)


def judge(
    ours: Sequence[Tensor],
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    terms: Sequence[Tensor],
    steps: int,
    other: Callable[..., Sequence[Tensor]] | None = None,
) -> None:
    """Results of a function that is linear in each input, against the reference in float64.

    A sum of terms t that each pass through n roundings is off by at most n * unit * sum |t|, to first order.

    Whether an element is finite may depend on a rounding: an infinite value times an interpolation weight that is 0 in
    float64, and not quite in float32. So it is judged where the reference in both gives the same kind.

    Args:
        function: the reference; its results in the order of ours.
        terms: for each result the sum of the magnitudes of its terms.
        steps: roundings that one term passes through.
        other: another reference, right as well where the first is not finite.
    """
    dtype = inputs[0].dtype
    truth = function(*[t.double() for t in inputs])
    stock = function(*[t.to(accumulator(dtype)) for t in inputs])
    others = other(*[t.double() for t in inputs]) if other else truth
    for result, exact, plain, sums, second in zip(ours, truth, stock, terms, others, strict=True):
        assert result.dtype == dtype
        slack = steps * (1.01 * unit(dtype) * sums + least(dtype))
        assert_within(result, exact, slack, kinds(exact) == kinds(plain), second)


def spread(cells: Tensor, levels: Sequence[tuple[int, int]]) -> Tensor:
    """The greatest of each cell of (N, P, ...) and its neighbours in its level.

    Rounding moves a pixel's place between cells by a small part of a cell: the cells beside the right ones count, too.
    """
    parts = []
    for part, (h, w) in zip(cells.split([h * w for h, w in levels], 1), levels, strict=True):
        maps = part.flatten(2).transpose(1, 2).unflatten(2, (h, w))
        parts.append(spread_map(maps).flatten(2).transpose(1, 2).reshape(part.shape))
    return torch.cat(parts, 1)


def spread_map(maps: Tensor) -> Tensor:
    return F.max_pool2d(maps, 3, 1, 1) if maps.numel() else maps


def without_zero_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference in which no value counts where its interpolation weight is 0.

    F.interpolate makes NaN of 0 times infinity; of the last row even, which it reads twice. The operators read it once.
    Both are right.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(F, "interpolate", _interpolate_what_counts):
            return function(*args, **kwargs)

    return run


_interpolate = F.interpolate


def _interpolate_what_counts(input: Tensor, size: Any, **settings: Any) -> Tensor:
    def reached(where: Tensor) -> Tensor:
        return _interpolate(where.to(input.dtype), size, **settings) > 0

    result = _interpolate(input.nan_to_num(0, 0, 0), size, **settings)
    if input.isfinite().all():
        return result
    above, below = reached(input == torch.inf), reached(input == -torch.inf)
    result = result.masked_fill(above, torch.inf).masked_fill(below, -torch.inf)
    return result.masked_fill(reached(input.isnan()) | (above & below), torch.nan)


def kinds_between(sources: Sequence[Sequence[int]], size: Sequence[int]) -> list[str]:
    """The values whose interpolation to a size is specified.

    Along an axis that keeps its size, F.interpolate reads one value on a CPU, and a neighbour with weight 0 besides on
    CUDA, as the operators do: whether 0 times infinity, NaN, gets into a result is open there.
    """
    return FINITE if any(a == b > 1 for source in sources for a, b in zip(source, size, strict=True)) else ANY


def interpolation_steps(size: Sequence[int]) -> int:
    """Roundings of an interpolated value in units of its neighbourhood's greatest: places, weights, products, sums.

    A place in a map of n cells is a number up to n, off by some units of n.
    """
    return 4 * (size[0] + size[1]) + 16


def gradients(function: Callable[..., Tensor], count: int) -> Callable[..., list[Tensor]]:
    """Of (inputs..., gradient of the result): the result, and the gradients of the first `count` inputs."""

    def run(*inputs: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs[:count]]
        result = function(*leaves, *inputs[count:-1])
        return [result.detach(), *torch.autograd.grad(result, leaves, inputs[-1].to(result.dtype))]

    return run
