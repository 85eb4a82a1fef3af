"""upsample_softmax_accumulate_: values, windows, mirroring, layouts, registration, bad input."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, make
from test_upsample_argmax import SHAPES

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_right(probabilities, logits, **arguments) -> None:
    """At most twice the error of the reference in the same dtype; what lies around the window stays."""
    exact, stock = probabilities.double(), probabilities.clone()
    reference.upsample_softmax_accumulate_(exact, logits.double(), **arguments)
    reference.upsample_softmax_accumulate_(stock, logits, **arguments)
    before = probabilities.clone()
    assert ops.upsample_softmax_accumulate_(probabilities, logits, **arguments) is probabilities
    error, stock_error = ((p.double() - exact).abs().max() for p in (probabilities, stock))
    eps = torch.finfo(probabilities.dtype).eps * exact.abs().max()
    assert error <= (2 * stock_error + eps if probabilities.dtype == torch.float32 else 64 * eps)
    top, left = arguments.get("top", 0), arguments.get("left", 0)
    height, width = arguments.get("size") or (before.size(2) - top, before.size(3) - left)
    for p in (before, probabilities):
        p[:, :, top : top + height, left : left + width] = 0
    assert torch.equal(before, probabilities)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_values(device, shape, size, dtype):
    for align_corners in (False, True):
        for layout in ("contiguous", "channels_last"):
            logits = make((2, *shape), layout, dtype, device)
            probabilities = make((2, shape[0], *size), layout, wide(dtype), device, seed=1)
            assert_right(probabilities, logits, align_corners=align_corners, mirrored=align_corners)


@pytest.mark.parametrize("height", [40, 47, 60])
def test_columns_of_every_length(device, height):
    """So many images that a thread of the CUDA kernels takes all pixels between two rows of logits: 5 to 8 here."""
    logits = make((32, 6, 8, 2), "contiguous", torch.float32, device)
    probabilities = make((32, 6, height, 5), "contiguous", torch.float32, device, seed=1)
    assert_right(probabilities, logits, align_corners=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_of_every_layout(device, layout, dtype):
    for mirrored in (False, True):
        logits = make((2, 19, 9, 8), layout, dtype, device)
        probabilities = make((2, 19, 50, 90), layout, wide(dtype), device, seed=1)
        window = {"top": 3, "left": 7, "size": (33, 70), "weight": 0.25}
        assert_right(probabilities, logits, align_corners=False, mirrored=mirrored, **window)


def test_mirrored_logits_of_a_mirrored_image(device):
    logits = make((1, 7, 5, 6), "contiguous", torch.float64, device)
    straight, mirrored = (torch.zeros(1, 7, 20, 30, dtype=torch.float64, device=device) for _ in range(2))
    ops.upsample_softmax_accumulate_(straight, logits, align_corners=False)
    ops.upsample_softmax_accumulate_(mirrored, logits.flip(3), align_corners=False, mirrored=True)
    torch.testing.assert_close(mirrored, straight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(straight.sum(1), torch.ones_like(straight[:, 0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_infinite_logits_count_only_with_their_weights(device, align_corners, layout):
    """A class switched off by -inf has probability 0, and the others are as without it."""
    logits = make((2, 6, 3, 5), layout, torch.float32, device)
    remaining = torch.tensor([0, 1, 2, 4, 5], device=device)
    for size, mirrored in (((3, 5), False), ((5, 9), True), ((24, 80), False)):
        probabilities, expected = (torch.zeros(2, k, *size, device=device) for k in (6, 5))
        options = {"align_corners": align_corners, "mirrored": mirrored}
        ops.upsample_softmax_accumulate_(expected, logits[:, remaining], **options)
        ops.upsample_softmax_accumulate_(
            probabilities, logits.index_fill(1, remaining.new_tensor(3), -torch.inf), **options
        )
        torch.testing.assert_close(probabilities[:, remaining], expected)
        assert not probabilities[:, 3].any()


@pytest.mark.parametrize("extreme", [torch.inf, torch.nan, -torch.inf, 3e38, -3e38])
def test_extreme_values_as_torch(device, extreme):
    """Where nothing is interpolated; a pixel beside one that is not finite is as ever."""
    logits = make((1, 20, 6, 7), "contiguous", torch.float32, device)
    logits[0, 3, 2, 3] = extreme
    logits[0, :, 4, 4] = extreme
    probabilities = ops.upsample_softmax_accumulate_(torch.zeros_like(logits), logits, align_corners=False)
    torch.testing.assert_close(probabilities, logits.softmax(1), equal_nan=True)


def test_great_differences_and_nan(device):
    logits = torch.tensor([[0.0, -1e4, 50.0], [100.0, 0.0, torch.nan]], device=device).view(2, 3, 1, 1)
    probabilities = torch.zeros(2, 3, 1, 1, device=device)
    ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=False)
    torch.testing.assert_close(probabilities, logits.softmax(1), equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device, layout):
    probabilities = make((2, 5, 20, 20), layout, torch.float32, device)
    logits = make((2, 5, 4, 5), layout, torch.bfloat16, device)
    torch.library.opcheck(
        torch.ops.pspnet_fast.upsample_softmax_accumulate_.default,
        (probabilities, logits, 1, 2, 9, 7, True, False, 0.5),
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)  # the compiler knows no kernels
def test_compiles_with_dynamic_sizes(device):
    def function(probabilities, logits, top: int):
        p = probabilities.clone()
        return ops.upsample_softmax_accumulate_(p, logits, align_corners=True, top=top, left=2)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((14, 15), (16, 13)):
        probabilities = make((2, 5, *size), "contiguous", torch.float32, device)
        logits = make((2, 5, size[1] - 9, 4), "contiguous", torch.float32, device)
        arguments = (probabilities, logits, size[0] - 12)
        assert torch.equal(compiled(*arguments), function(*arguments))


def test_same_bits_every_run_and_with_one_thread(device):
    logits = make((2, 19, 30, 30), "contiguous", torch.float32, device)
    results, threads = [], torch.get_num_threads()
    for number in (threads, threads, 2, 1):
        torch.set_num_threads(number)
        results.append(torch.zeros(2, 19, 237, 237, device=device))
        ops.upsample_softmax_accumulate_(results[-1], logits, align_corners=True)
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_the_version_counter_sees_the_writing():
    probabilities = torch.zeros(1, 3, 8, 8)
    saved = probabilities * torch.ones(1, requires_grad=True)
    ops.upsample_softmax_accumulate_(probabilities, torch.zeros(1, 3, 2, 2), align_corners=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_no_gradient(device):
    logits = torch.zeros(1, 3, 2, 2, device=device, requires_grad=True)
    probabilities = torch.zeros(1, 3, 8, 8, device=device)
    with pytest.raises(ValueError, match="has no gradient"):
        ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.ops.pspnet_fast.upsample_softmax_accumulate_(probabilities, logits, 0, 0, 8, 8, True, False, 1.0)
    with torch.no_grad():
        ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True)
    assert not probabilities.requires_grad


def test_empty_batch(device):
    probabilities = torch.empty(0, 3, 8, 8, device=device)
    logits = torch.empty(0, 3, 2, 2, device=device)
    assert ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True) is probabilities


P, L = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 2, 2)


@pytest.mark.parametrize(
    ("probabilities", "logits", "arguments", "error", "message"),
    [
        (torch.zeros(3, 8, 8), L, {}, ValueError, r"probabilities must have shape \(N, C, H, W\)"),
        (P.half(), L, {}, TypeError, "probabilities must be torch.float32 for logits of torch.float32"),
        (P, L.double(), {}, TypeError, "probabilities must be torch.float64 for logits of torch.float64"),
        (P, L.to("meta"), {}, ValueError, "probabilities must be on the device of logits"),
        (P, torch.zeros(1, 4, 2, 2), {}, ValueError, r"logits must have shape .* = \(1, 3, 2, 2\)"),
        (P, L, {"top": -1}, ValueError, "top and left must be at least 0, but are -1 and 0"),
        (P, L, {"top": 8}, ValueError, r"size must be at least 1 x 1, but is \(0, 8\)"),
        (P, L, {"left": 3, "size": (4, 6)}, ValueError, "the window must lie in probabilities"),
    ],
)
def test_bad_input(probabilities, logits, arguments, error, message):
    with pytest.raises(error, match=message):
        ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True, **arguments)


def test_the_raw_operator_checks_too():
    raw = torch.ops.pspnet_fast.upsample_softmax_accumulate_
    with pytest.raises(RuntimeError, match="hold the window"):
        raw(P, L, 0, 1, 8, 8, True, False, 1.0)
    with pytest.raises(RuntimeError, match="probabilities must be float32"):
        raw(P.double(), L, 0, 0, 8, 8, True, False, 1.0)
