"""upsample_argmax: classes, confidence, ties, NaN, layouts, registration, bad input."""

import os
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, LAYOUTS, make

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")

# (K, h, w) -> (H, W): up, down, one pixel, integer and other scales, more than a tile, more classes than a byte holds
SHAPES = [
    ((1, 4, 5), (9, 7)),
    ((19, 9, 8), (65, 70)),
    ((24, 9, 8), (65, 70)),
    ((150, 6, 5), (41, 33)),
    ((7, 33, 29), (10, 11)),
    ((5, 1, 1), (3, 130)),
    ((8, 6, 6), (1, 1)),
    ((257, 3, 4), (8, 16)),
    ((2000, 3, 3), (7, 6)),
]


def assert_right(logits, size, align_corners) -> None:
    """The reference's classes in float64; elsewhere, where the two greatest logits differ by more than rounding."""
    classes, confidence = ops.upsample_argmax(logits, size, align_corners=align_corners, return_confidence=True)
    expected, probability = reference.upsample_argmax(
        logits.double(), size, align_corners=align_corners, return_confidence=True
    )
    assert classes.dtype == (torch.uint8 if logits.size(1) <= 256 else torch.int32)
    assert classes.shape == confidence.shape == (logits.size(0), *size)
    assert confidence.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert torch.equal(ops.upsample_argmax(logits, size, align_corners=align_corners), classes)
    different = classes.long() != expected.long()
    if logits.dtype != torch.float64 and logits.size(1) > 1:
        values = torch.nn.functional.interpolate(logits.double(), size, mode="bilinear", align_corners=align_corners)
        first, second = values.topk(2, 1).values.unbind(1)
        # a source coordinate is off by eps * its size, and logits between neighbours differ by a few
        rounding = 8 * torch.finfo(torch.float32).eps * max(logits.shape[2:]) * logits.double().abs().max()
        different &= first - second > rounding
    assert not different.any()
    _, stock = reference.upsample_argmax(logits, size, align_corners=align_corners, return_confidence=True)
    error, stock_error = ((c.double() - probability).abs().max() for c in (confidence, stock))
    eps = torch.finfo(confidence.dtype).eps
    assert error <= (2 * stock_error + eps if logits.dtype != torch.float64 else 64 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_values(device, shape, size, dtype):
    for align_corners in (False, True):
        for layout in ("contiguous", "channels_last"):
            assert_right(make((2, *shape), layout, dtype, device), size, align_corners)


@pytest.mark.parametrize("height", [40, 47, 60])
def test_columns_of_every_length(device, height):
    """So many images that a thread of the CUDA kernels takes all pixels between two rows of logits: 5 to 8 here."""
    assert_right(make((32, 6, 8, 2), "contiguous", torch.float32, device), (height, 5), False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(device, layout, dtype):
    for k in (19, 24):
        assert_right(make((2, k, 9, 8), layout, dtype, device), (33, 70), False)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_lowest_of_equal_classes_wins(device, layout, align_corners):
    half = make((1, 12, 5, 6), layout, torch.float32, device)
    logits = torch.cat([half, half], 1).contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    classes = ops.upsample_argmax(logits, (37, 50), align_corners=align_corners)
    assert torch.equal(classes, ops.upsample_argmax(half, (37, 50), align_corners=align_corners))
    flat = torch.zeros(1, 300, 3, 3, device=device)
    assert not ops.upsample_argmax(flat, (9, 9), align_corners=align_corners).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_the_greatest_as_in_torch(device, dtype, layout):
    logits = make((1, 24, 4, 4), layout, dtype, device)
    logits[0, 7, 0, 0] = logits[0, 3, 0, 0] = logits[0, 9, 3, 3] = logits[0, 0, 0, 3] = torch.nan
    classes, confidence = ops.upsample_argmax(logits, (7, 9), align_corners=False, return_confidence=True)
    values = torch.nn.functional.interpolate(logits.double(), (7, 9), mode="bilinear", align_corners=False)
    assert torch.equal(classes.long(), values.argmax(1))
    assert torch.equal(confidence.isnan(), values.isnan().any(1))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("size", "align_corners"), [((4, 5), True), ((7, 9), True), ((7, 7), False), ((70, 90), False)]
)
def test_infinite_logits_count_only_with_their_weights(device, size, align_corners, layout):
    """A class switched off by -inf never wins, the others are as without it; where all are off, it is class 0, NaN."""
    logits = make((1, 20, 4, 5), layout, torch.float32, device)
    remaining = torch.tensor([k for k in range(20) if k != 5], device=device)
    expected = ops.upsample_argmax(logits[:, remaining], size, align_corners=align_corners, return_confidence=True)
    logits[:, 5] = -torch.inf
    classes, confidence = ops.upsample_argmax(logits, size, align_corners=align_corners, return_confidence=True)
    assert torch.equal(classes, remaining[expected[0].long()].to(torch.uint8))
    torch.testing.assert_close(confidence, expected[1])
    logits[:] = -torch.inf
    classes, confidence = ops.upsample_argmax(logits, size, align_corners=align_corners, return_confidence=True)
    assert not classes.any()
    assert confidence.isnan().all()


@pytest.mark.parametrize("extreme", [torch.inf, torch.nan, -torch.inf, 3e38, -3e38])
def test_extreme_values_as_torch(device, extreme):
    """Where nothing is interpolated; a pixel beside one that is not finite is as ever."""
    logits = make((1, 20, 6, 7), "contiguous", torch.float32, device)
    logits[0, 3, 2, 3] = extreme
    classes, confidence = ops.upsample_argmax(logits, (6, 7), align_corners=False, return_confidence=True)
    assert torch.equal(classes.long(), logits.argmax(1))
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1), equal_nan=True)


@pytest.mark.parametrize("return_confidence", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device, layout, return_confidence):
    for k in (5, 300):
        logits = make((2, k, 4, 5), layout, torch.bfloat16, device)
        torch.library.opcheck(torch.ops.pspnet_fast.upsample_argmax.default, (logits, 9, 7, True, return_confidence))


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)  # the compiler knows no kernels
def test_compiles_with_dynamic_sizes(device):
    def function(logits, height: int):
        return ops.upsample_argmax(logits, (height, 2 * logits.size(3)), align_corners=True, return_confidence=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((4, 5), (6, 3)):
        logits = make((2, 5, *size), "contiguous", torch.float32, device)
        assert all(map(torch.equal, compiled(logits, 11 + size[0]), function(logits, 11 + size[0])))


def test_same_bits_every_run_and_with_one_thread(device):
    logits = make((2, 19, 30, 30), "contiguous", torch.float32, device)
    first = ops.upsample_argmax(logits, (237, 237), align_corners=True, return_confidence=True)
    threads = torch.get_num_threads()
    for number in (threads, 2, 1):
        torch.set_num_threads(number)
        again = ops.upsample_argmax(logits, (237, 237), align_corners=True, return_confidence=True)
        assert all(map(torch.equal, first, again))
    torch.set_num_threads(threads)


def test_classes_need_no_gradient_and_confidence_has_none(device):
    logits = torch.randn(1, 3, 4, 4, device=device, requires_grad=True)
    assert not ops.upsample_argmax(logits, (8, 8), align_corners=True).requires_grad
    with pytest.raises(ValueError, match="return_confidence has no gradient"):
        ops.upsample_argmax(logits, (8, 8), align_corners=True, return_confidence=True)
    with torch.no_grad():
        ops.upsample_argmax(logits, (8, 8), align_corners=True, return_confidence=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
def test_memory() -> None:
    """The classes and a few rows of logits, where stock PyTorch holds 2 x 150 x 473 x 473 floats, 268 MB."""
    script = """
import torch
from resident import resident
from pspnet_fast import ops, reference

def growth(module, size):
    before = resident("VmRSS")
    classes = module.upsample_argmax(logits, (size, size), align_corners=True)
    return resident("VmHWM") - before

logits = torch.randn(2, 150, 60, 60)
growth(ops, 8)
print(growth(ops, 473), growth(reference, 473))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    ours, stock = map(int, done.stdout.split())
    assert ours < 4e6
    assert stock > 250e6, "the measure does not even see full-resolution logits"


def test_empty_batch(device):
    classes, confidence = ops.upsample_argmax(
        torch.empty(0, 8, 4, 5, device=device), (9, 9), align_corners=True, return_confidence=True
    )
    assert classes.shape == confidence.shape == (0, 9, 9)


@pytest.mark.parametrize(
    ("logits", "size", "error", "message"),
    [
        (torch.zeros(8, 4, 5), (9, 9), ValueError, r"logits must have shape \(N, C, H, W\)"),
        (torch.zeros(1, 8, 4, 5).int(), (9, 9), TypeError, "logits must be float32"),
        (torch.zeros(1, 0, 4, 5), (9, 9), ValueError, "logits must have C >= 1"),
        (torch.zeros(1, 8, 4, 5), 9, TypeError, r"size must be a pair \(height, width\), but is 9"),
        (torch.zeros(1, 8, 4, 5), (9, 9.5), TypeError, "size must hold ints"),
        (torch.zeros(1, 8, 4, 5), (0, 9), ValueError, r"size must be at least 1 x 1, but is \(0, 9\)"),
    ],
)
def test_bad_input(logits, size, error, message):
    with pytest.raises(error, match=message):
        ops.upsample_argmax(logits, size, align_corners=True)


def test_the_raw_operator_checks_too():
    with pytest.raises(RuntimeError, match="height and width must be from 1 to 2147483647"):
        torch.ops.pspnet_fast.upsample_argmax(torch.zeros(1, 2, 3, 3), 0, 4, True, False)
