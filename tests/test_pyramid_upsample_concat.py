"""pyramid_upsample_concat_: values, gradients, layouts, registration, bad input."""

import itertools

import pytest
import torch
from cases import BINS, DTYPES, LAYOUTS, LAYOUTS_AND_CHANNELS, SIZES, assert_accurate, count, make, with_gradients
from torch import Tensor

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")

R = 19  # channels of a level: no multiple of any vector


BEFORE = 8  # channels before the levels': whole vectors of 16 bytes, as the channels of x are in a network


def upsample(module, size, bins, align_corners: bool, channels_last: bool = False):
    """reduced -> a concatenation of BEFORE channels of 0 and the upsampled levels."""

    def function(reduced: Tensor) -> Tensor:
        n, _, r = reduced.shape
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (n, BEFORE + len(bins) * r, *size)
        concat = torch.empty(shape, dtype=reduced.dtype, device=reduced.device, memory_format=memory_format)
        (concat if module is reference else concat[:, :BEFORE]).zero_()
        return module.pyramid_upsample_concat_(concat, reduced, bins, offset=BEFORE, align_corners=align_corners)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", BINS)
def test_values_and_gradient(device, bins, size, dtype):
    for align_corners, (layout, channels) in itertools.product((False, True), LAYOUTS_AND_CHANNELS):
        reduced = torch.randn(2, count(bins), channels, dtype=torch.float64).to(device, dtype)
        grad = make((2, BEFORE + len(bins) * channels, *size), layout, dtype, device)
        run = [
            with_gradients(upsample(m, size, bins, align_corners, layout == "channels_last"), 1)
            for m in (ops, reference)
        ]
        assert_accurate(*run, reduced, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_layout(device, layout):
    grad = make((2, 4 + 2 * R, 13, 9), layout, torch.float64, device)
    raw = torch.ops.pspnet_fast.pyramid_upsample_concat_backward
    torch.testing.assert_close(
        raw(grad, 3, R, [2, 2, 3, 5], False), raw(grad.contiguous(), 3, R, [2, 2, 3, 5], False), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "channels_last_slice"])
def test_other_channels_stay(device, layout):
    concat = make((2, 9, 5, 4), layout, torch.float32, device)
    before = concat.clone()
    ops.pyramid_upsample_concat_(concat, torch.zeros(2, 5, 3, device=device), (1, 2), offset=2)
    assert torch.equal(concat[:, :2], before[:, :2])
    assert torch.equal(concat[:, 2:8], torch.zeros(2, 6, 5, 4, device=device))
    assert torch.equal(concat[:, 8:], before[:, 8:])


def test_gradcheck_with_what_concat_held_before(device):
    reduced = torch.randn(2, 5, 3, dtype=torch.float64, device=device, requires_grad=True)
    before = make((2, 8, 4, 5), "contiguous", torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda b, r: ops.pyramid_upsample_concat_(b.clone(), r, (1, 2), offset=1, align_corners=False),
        (before, reduced),
    )


@pytest.mark.parametrize("first", [0, 3, 6])
def test_gradcheck_behind_the_pooling(device, first):
    """The short cut that hands the gradient on must be exact also where the levels overwrite part of the copy."""

    def function(x: Tensor, reduced: Tensor) -> Tensor:
        concat = torch.zeros(1, 12, 3, 4, dtype=torch.float64, device=device)
        pooled = ops.pyramid_pool(x, (1, 2), concat=concat, offset=3)
        return ops.pyramid_upsample_concat_(concat, reduced + pooled, (1, 2), offset=first)

    x = make((1, 3, 3, 4), "contiguous", torch.float64, device).requires_grad_()
    reduced = torch.randn(1, 5, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, reduced))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device, layout, requires_grad):
    concat = make((2, 8, 4, 5), layout, torch.float32, device)
    reduced = torch.randn(2, 5, 3, device=device, requires_grad=requires_grad)
    torch.library.opcheck(
        torch.ops.pspnet_fast.pyramid_upsample_concat_.default, (concat, reduced, 1, [1, 1, 2, 2], True)
    )
    torch.library.opcheck(
        torch.ops.pspnet_fast.pyramid_upsample_concat_backward.default, (concat, 1, 3, [1, 1, 2, 2], True)
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_every_run(device, layout):
    reduced = torch.randn(2, 50, R, device=device)
    grad = make((2, BEFORE + 4 * R, 61, 97), layout, torch.float32, device)
    run = with_gradients(upsample(ops, (61, 97), (1, 2, 3, 6), True, layout == "channels_last"), 1)
    first = run(reduced, grad)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(reduced, grad), strict=True))


def test_one_thread_gives_the_same_bits():
    grad = make((1, 2 * R, 61, 97), "channels_last", torch.float32, torch.device("cpu"))
    raw = torch.ops.pspnet_fast.pyramid_upsample_concat_backward
    threads, many = torch.get_num_threads(), raw(grad, 0, R, [2, 2, 3, 3], True)
    torch.set_num_threads(1)
    try:
        assert torch.equal(raw(grad, 0, R, [2, 2, 3, 3], True), many)
    finally:
        torch.set_num_threads(threads)


def test_the_version_counter_sees_the_writing():
    """Autograd must notice that a tensor saved for backward has been overwritten."""
    concat = torch.randn(1, 3, 4, 4)
    saved = concat * torch.ones(1, requires_grad=True)
    ops.pyramid_upsample_concat_(concat, torch.zeros(1, 1, 3), (1,), offset=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_empty_batch(device):
    concat = torch.empty(0, 8, 4, 5, device=device)
    assert ops.pyramid_upsample_concat_(concat, torch.empty(0, 5, 3, device=device), (1, 2), offset=1) is concat


@pytest.mark.parametrize(
    ("concat", "reduced", "offset", "error", "message"),
    [
        (torch.zeros(8, 4, 5), torch.zeros(2, 5, 3), 1, ValueError, r"concat must have shape \(N, C, H, W\)"),
        (torch.zeros(2, 8, 4, 5), torch.zeros(2, 6, 3), 1, ValueError, r"reduced must have shape .* = \(2, 5, 3\)"),
        (torch.zeros(2, 8, 4, 5), torch.zeros(1, 5, 3), 1, ValueError, r"reduced must have shape .* = \(2, 5, 3\)"),
        (torch.zeros(2, 8, 4, 5), torch.zeros(2, 5, 3), 3, ValueError, "offset must leave room for 6 channels"),
        (torch.zeros(2, 8, 4, 5), torch.zeros(2, 5, 3).half(), 1, TypeError, "reduced must have the dtype"),
        (torch.zeros(2, 8, 4, 5), torch.zeros(2, 5, 3, device="meta"), 1, ValueError, "reduced must be on the device"),
        (torch.zeros(2, 8, 0, 5), torch.zeros(2, 5, 3), 1, ValueError, "concat must have C >= 1, H >= 1 and W >= 1"),
    ],
)
def test_bad_input(concat, reduced, offset, error, message):
    with pytest.raises(error, match=message):
        ops.pyramid_upsample_concat_(concat, reduced, (1, 2), offset=offset)


def test_the_raw_operator_checks_too():
    raw = torch.ops.pspnet_fast
    with pytest.raises(RuntimeError, match="too few channels"):
        raw.pyramid_upsample_concat_(torch.zeros(2, 8, 4, 5), torch.zeros(2, 5, 3), 3, [1, 1, 2, 2], True)
    transposed = torch.zeros(2, 8, 5, 4).transpose(2, 3)
    with pytest.raises(RuntimeError, match="concat must be contiguous or channels-last"):
        raw.pyramid_upsample_concat_(transposed, torch.zeros(2, 5, 3), 1, [1, 1, 2, 2], True)
