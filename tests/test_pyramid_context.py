"""pyramid_context_: values, gradient, layouts, registration, bad input."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BINS,
    DTYPES,
    LAYOUTS,
    LAYOUTS_AND_CHANNELS,
    MANY_CELLS,
    SIZES,
    assert_accurate,
    count,
    make,
    with_gradients,
)
from torch import Tensor

from pspnet_fast import ops, reference
from pspnet_fast.ops.checks import as_levels

pytestmark = pytest.mark.usefixtures("poison")

MODES = [{"mode": "bilinear", "align_corners": corners} for corners in (False, True)] + [{"mode": "nearest"}]
WINDOWS = [(3, 1), (1, 1), ((5, 3), (2, 7))]  # (kernel_size, dilation); the last reaches beyond small maps
RAW = ([1, 1, 2, 3], [3, 5], [1, 2], 1)  # bins, kernel_size, dilation, interpolation of the raw operators


def taps_shape(n: int, bins, kernel_size, channels: int) -> tuple[int, int, int, int]:
    kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return (n, count(bins), kh * kw, channels)


def context(module, bins, kernel_size, **settings):
    """(conv, taps) -> the sum, leaving conv as it is."""
    return lambda conv, taps: module.pyramid_context_(conv.clone(), taps, bins, kernel_size, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", BINS)
def test_values_and_gradients(device, bins, size, dtype):
    cases = list(itertools.product(LAYOUTS_AND_CHANNELS, MODES[:2], WINDOWS))
    cases += [(case, MODES[2], WINDOWS[i % 3]) for i, case in enumerate(LAYOUTS_AND_CHANNELS)]
    if size[0] * size[1] > 1000:  # the reference takes seconds
        layouts = LAYOUTS_AND_CHANNELS[::2] + LAYOUTS_AND_CHANNELS[:1]
        cases = [(case, mode, WINDOWS[0]) for case, mode in zip(layouts, MODES, strict=True)]
    # a third of them each; every one comes with every size, dtype and bins
    cases = cases[(BINS.index(bins) + SIZES.index(size) + DTYPES.index(dtype)) % 3 :: 3]
    for (layout, channels), mode, (kernel_size, dilation) in cases:
        conv = make((2, channels, *size), layout, dtype, device)
        taps = torch.randn(taps_shape(2, bins, kernel_size, channels), dtype=torch.float64).to(device, dtype)
        grad = make((2, channels, *size), layout, dtype, device, seed=1)
        settings = {"dilation": dilation, **mode}
        run = [with_gradients(context(m, bins, kernel_size, **settings), 2) for m in (ops, reference)]
        assert_accurate(*run, conv, taps, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize(("size", "bins", "channels", "kernel_size", "dilation"), MANY_CELLS)
def test_levels_of_many_cells(device, size, bins, channels, kernel_size, dilation, layout, dtype):
    conv = make((2, channels, *size), layout, dtype, device)
    grad = make((2, channels, *size), layout, dtype, device, seed=1)
    taps = torch.randn(taps_shape(2, bins, kernel_size, channels), dtype=torch.float64).to(device, dtype)
    for mode in MODES:
        settings = {"dilation": dilation, **mode}
        run = [with_gradients(context(m, bins, kernel_size, **settings), 2) for m in (ops, reference)]
        assert_accurate(*run, conv, taps, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "slice", "channels_last"])
@pytest.mark.parametrize(("size", "kernel_size"), [((9, 20), 3), ((5, 139), (5, 3))])
def test_blocks_of_channels_and_pixels(device, size, kernel_size, layout, dtype):
    """More channels, rows and columns than a block of CUDA's products takes at once."""
    bins, channels = (1, 2, 3, 6), 40
    conv, grad = (make((2, channels, *size), layout, dtype, device, seed) for seed in (0, 1))
    taps = torch.randn(taps_shape(2, bins, kernel_size, channels), dtype=torch.float64).to(device, dtype)
    run = [with_gradients(context(m, bins, kernel_size, align_corners=False), 2) for m in (ops, reference)]
    assert_accurate(*run, conv, taps, grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_norm_and_relu_with_many_cells(device, layout):
    conv = make((2, 7, 18, 17), layout, torch.float32, device)
    taps, norm = torch.randn(2, 17 * 16, 9, 7, device=device), [torch.rand(7, device=device) + 0.5 for _ in range(4)]

    def run(module):
        return lambda conv, taps, *norm: [context(module, ((17, 16),), 3, norm=(*norm, 0.1), relu=True)(conv, taps)]

    assert_accurate(run(ops), run(reference), conv, taps, *norm)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel_size", "dilation"), WINDOWS)
@pytest.mark.parametrize("size", [(13, 9), (3, 2)])
def test_is_the_convolution_of_the_upsampled_levels(device, size, kernel_size, dilation, mode):
    """The identity that the operator is made for, by F.interpolate and F.conv2d."""
    bins, r, o = ((1, 2), 3, (2, 4)), 4, 6
    kh, kw = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    expected, taps = torch.zeros(2, o, *size, dtype=torch.float64, device=device), []
    step = (dilation, dilation) if isinstance(dilation, int) else dilation
    for level in as_levels(bins):
        z = torch.randn(2, r, *level, dtype=torch.float64, device=device)
        weight = torch.randn(o, r, kh, kw, dtype=torch.float64, device=device)
        upsampled = F.interpolate(z, size, **(mode if mode["mode"] == "bilinear" else {"mode": "nearest"}))
        expected += F.conv2d(upsampled, weight, padding=(kh // 2 * step[0], kw // 2 * step[1]), dilation=step)
        taps.append(torch.einsum("ocuv,ncij->nijuvo", weight, z).reshape(2, -1, kh * kw, o))
    settings = {"dilation": dilation, **mode}
    actual = ops.pyramid_context_(torch.zeros_like(expected), torch.cat(taps, 1), bins, kernel_size, **settings)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_dtype", ["own", torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("layout", "channels"), [*LAYOUTS_AND_CHANNELS, ("contiguous", 40)])
def test_norm_and_relu(device, layout, channels, relu, dtype, norm_dtype):
    conv = make((2, channels, 13, 9), layout, dtype, device)
    taps = torch.randn(taps_shape(2, (1, 3), 3, channels), dtype=torch.float64).to(device, dtype)
    stored = dtype if norm_dtype == "own" else norm_dtype
    norm = [(torch.rand(channels, dtype=torch.float64) + 0.5).to(device, stored) for _ in range(4)]

    def run(module):
        def function(conv: Tensor, taps: Tensor) -> list[Tensor]:
            # eager in float64 takes the norm in float64
            values = [t.to(conv.dtype if conv.dtype == torch.float64 or module is reference else stored) for t in norm]
            folded = (*values, 0.1)
            return [context(module, (1, 3), 3, norm=folded, relu=relu)(conv, taps)]

        return function

    assert_accurate(run(ops), run(reference), conv, taps)


def test_relu_hands_on_what_is_not_a_number(device):
    conv = torch.full((1, 2, 3, 3), torch.nan, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = conv.contiguous(memory_format=layout)
        assert ops.pyramid_context_(conv, torch.zeros(1, 1, 9, 2, device=device), (1,), 3, relu=True).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_every_layout(device, layout):
    grad = make((2, 19, 13, 9), layout, torch.float64, device)
    raw = torch.ops.pspnet_fast.pyramid_context_backward
    torch.testing.assert_close(raw(grad, *RAW), raw(grad.contiguous(), *RAW), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "channels_last_slice"])
def test_writes_into_slices(device, layout):
    conv = make((2, 19, 13, 9), layout, torch.float64, device)
    taps = torch.randn(2, 5, 9, 19, dtype=torch.float64, device=device)
    expected = reference.pyramid_context_(conv.clone(), taps, (1, 2), 3)
    assert ops.pyramid_context_(conv, taps, (1, 2), 3) is conv
    torch.testing.assert_close(conv, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "channels_last_slice"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_without_reading(device, layout, dtype):
    """What conv holds counts no more than what an allocator hands out, and gets no gradient."""
    conv = make((2, 19, 13, 9), layout, dtype, device)
    taps = torch.randn(2, 5, 9, 19, device=device).to(dtype).requires_grad_()
    norm = (*(torch.rand(19, device=device) for _ in range(4)), 0.1)
    zeros = torch.zeros_like(conv)
    for settings in ({}, {"norm": norm, "relu": True}, {"mode": "nearest"}):
        with torch.no_grad():
            expected = ops.pyramid_context_(zeros.clone(), taps, (1, 2), 3, **settings)
            conv.fill_(torch.nan)
            ops.pyramid_context_(conv, taps, (1, 2), 3, accumulate=False, **settings)
        assert torch.equal(conv, expected)
    before = conv.detach().clone().requires_grad_()
    written = context(ops, (1, 2), 3, accumulate=False)(before, taps)
    (grad,) = torch.autograd.grad(written.sum(), taps, retain_graph=True)
    (expected,) = torch.autograd.grad(context(ops, (1, 2), 3)(zeros, taps).sum(), taps)
    assert torch.equal(grad, expected)
    assert torch.autograd.grad(written.sum(), before, allow_unused=True, materialize_grads=True)[0].count_nonzero() == 0


def test_nearest_finds_the_cells_that_torch_finds(device):
    """For every size: where the scale is rounded, a pixel may get the cell before its own."""
    for bins, size in [(2, 82), (2, 164), (3, 141), (7, 7), (9, 4), (33, 66), (41, 200), (64, 199)]:
        cells = torch.arange(bins, dtype=torch.float32, device=device).view(1, bins, 1, 1)
        expected = F.interpolate(cells.transpose(1, 2), (size, 1), mode="nearest")
        conv = torch.empty(1, 1, size, 1, device=device)
        ops.pyramid_context_(conv, cells, ((bins, 1),), 1, mode="nearest", accumulate=False)
        assert torch.equal(conv, expected), (bins, size)


@pytest.mark.parametrize("settings", [{"align_corners": False}, {"mode": "nearest"}, {"accumulate": False}])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device, layout, settings):
    conv = make((2, 3, 4, 5), layout, torch.float64, device).requires_grad_()
    taps = torch.randn(2, 5, 15, 3, dtype=torch.float64, device=device, requires_grad=True)
    function = context(ops, (1, 2), (3, 5), dilation=(2, 1), **settings)
    assert torch.autograd.gradcheck(function, (conv, taps))


def test_the_gradient_of_conv_is_handed_on_without_a_copy():
    conv = torch.randn(1, 2, 4, 4, requires_grad=True)
    taps = torch.randn(1, 1, 9, 2, requires_grad=True)
    output = context(ops, (1,), 3)(conv, taps)
    seen = []
    output.grad_fn.register_hook(lambda inputs, outputs: seen.append((inputs[0], outputs[0])))
    output.sum().backward()
    assert seen[0][0].data_ptr() == seen[0][1].data_ptr()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device, layout, requires_grad):
    conv = make((2, 8, 4, 5), layout, torch.float32, device)
    taps = torch.randn(2, 7, 15, 8, device=device, requires_grad=requires_grad)
    norm = [] if requires_grad else [torch.ones(8, device=device) for _ in range(4)]
    raw = torch.ops.pspnet_fast
    torch.library.opcheck(raw.pyramid_context_.default, (conv, taps, norm, 0.1, not requires_grad, *RAW, True))
    torch.library.opcheck(raw.pyramid_context_backward.default, (conv, *RAW))


@pytest.mark.parametrize("bins", [(1, 2, 3, 6), ((31, 49),)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_every_run_and_with_one_thread(device, layout, bins):
    conv, grad = (make((2, 19, 61, 97), layout, torch.float32, device, seed) for seed in (0, 1))
    taps = torch.randn(2, count(bins), 9, 19, device=device)
    run = partial(with_gradients(context(ops, bins, 3), 2), conv, taps, grad)
    threads, first = torch.get_num_threads(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    torch.set_num_threads(3 if threads == 1 else 1)
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_the_version_counter_sees_the_writing():
    """Autograd must notice that a tensor saved for backward has been overwritten."""
    conv = torch.randn(1, 3, 4, 4)
    saved = conv * torch.ones(1, requires_grad=True)
    ops.pyramid_context_(conv, torch.zeros(1, 1, 9, 3), (1,), 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_empty_batch(device):
    conv = torch.empty(0, 8, 4, 5, device=device, requires_grad=True)
    taps = torch.empty(0, 5, 9, 8, device=device, requires_grad=True)
    context(ops, (1, 2), 3)(conv, taps).sum().backward()
    assert taps.grad.shape == (0, 5, 9, 8)


CONV, TAPS, ONES = torch.zeros(2, 8, 4, 5), torch.zeros(2, 5, 9, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"conv": CONV[0]}, ValueError, r"conv must have shape \(N, C, H, W\)"),
        ({"conv": CONV[:, :, :0]}, ValueError, "conv must have C >= 1, H >= 1 and W >= 1"),
        ({"taps": TAPS[:1]}, ValueError, r"taps must have shape .* = \(2, 5, 9, 8\), but has \(1, 5, 9, 8\)"),
        ({"kernel_size": 5}, ValueError, r"taps must have shape .* = \(2, 5, 25, 8\)"),
        ({"taps": TAPS.half()}, TypeError, "taps must have the dtype of the first argument, float32"),
        ({"taps": TAPS.to("meta")}, ValueError, "taps must be on the device"),
        ({"kernel_size": 2}, ValueError, "kernel_size must be odd and at least 1, but is 2"),
        ({"kernel_size": (3, 3, 3)}, TypeError, "kernel_size must be an int or a pair of ints"),
        ({"kernel_size": 1367}, ValueError, "kernel_size times the sum of the bins must be at most 4096"),
        ({"dilation": 0}, ValueError, "dilation must be from 1 to 65536, but is 0"),
        ({"bins": ()}, ValueError, "bins must have 1 to 16 levels"),
        ({"mode": "area"}, ValueError, "mode must be 'bilinear' or 'nearest', but is 'area'"),
        ({"accumulate": 1}, TypeError, "accumulate must be True or False, but is 1"),
        ({"norm": (ONES, ONES, ONES, ONES[:1], 0.1)}, ValueError, r"norm must have shape \(O,\) = \(8,\)"),
        ({"norm": (ONES, ONES, ONES, ONES.half(), 0.1)}, TypeError, "norm must be float32 or torch.float32 throughout"),
        ({"taps": TAPS.clone().requires_grad_(), "relu": True}, ValueError, "norm and relu are for inference"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.pyramid_context_(**{"conv": CONV, "taps": TAPS, "bins": (1, 2), "kernel_size": 3, **arguments})


def test_the_raw_operator_checks_too():
    raw = torch.ops.pspnet_fast.pyramid_context_
    with pytest.raises(RuntimeError, match="taps has the wrong shape"):
        raw(CONV, TAPS, [], 0.0, False, [1, 1, 2, 2], [3, 5], [1, 1], 1, True)
    with pytest.raises(RuntimeError, match="kernel_size must be odd"):
        raw(CONV, TAPS, [], 0.0, False, [1, 1, 2, 2], [3, 2], [1, 1], 1, True)
    with pytest.raises(RuntimeError, match="conv must be contiguous or channels-last"):
        raw(torch.zeros(2, 8, 5, 4).mT, TAPS, [], 0.0, False, [1, 1, 2, 2], [3, 3], [1, 1], 1, True)
    with pytest.raises(RuntimeError, match="no gradient with relu or by norm"):
        raw(CONV, TAPS.clone().requires_grad_(), [], 0.0, True, [1, 1, 2, 2], [3, 3], [1, 1], 1, True)
