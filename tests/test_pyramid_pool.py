"""pyramid_pool: values, gradients, the copy into a concatenation, layouts, registration, bad input."""

import pytest
import torch
from cases import (
    BINS,
    CHANNELS,
    DTYPES,
    LAYOUTS,
    LAYOUTS_AND_CHANNELS,
    SIZES,
    assert_accurate,
    count,
    make,
    with_gradients,
)
from torch import Tensor

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", BINS)
def test_values_and_gradient(device, bins, size, dtype):
    for layout, channels in LAYOUTS_AND_CHANNELS:
        x = make((2, channels, *size), layout, dtype, device)
        grad = torch.randn(2, count(bins), channels, device=device, dtype=torch.float64).to(dtype)
        run = [with_gradients(lambda x, m=m: m.pyramid_pool(x, bins), 1) for m in (ops, reference)]
        assert_accurate(*run, x, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 5])
def test_copy_into_concat(device, layout, offset):
    """The copy is exact, other channels stay, and its gradient joins that of the pooling in one result."""
    x = make((2, CHANNELS, 13, 9), layout, torch.float64, device)

    def run(module):
        def function(x: Tensor) -> Tensor:
            memory_format = ops.checks.memory_format(x)
            concat = torch.full((2, CHANNELS + 8, 13, 9), 7.0, device=device, dtype=x.dtype)
            concat = concat.contiguous(memory_format=memory_format)
            pooled = module.pyramid_pool(x, (1, 2, 3, 6), concat=concat, offset=offset)
            return torch.cat([pooled.flatten(), concat.contiguous().flatten()])

        return with_gradients(function, 1)

    grad = torch.randn(2 * (50 * CHANNELS + (CHANNELS + 8) * 117), device=device, dtype=torch.float64)
    ours, expected = run(ops)(x, grad), run(reference)(x, grad)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    copied = ours[0][100 * CHANNELS :].view(2, CHANNELS + 8, 13, 9)
    assert torch.equal(copied[:, offset : offset + CHANNELS], x)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradient_keeps_the_layout(device, layout):
    x = make((2, CHANNELS, 6, 5), layout, torch.float32, device).requires_grad_()
    (grad,) = torch.autograd.grad(ops.pyramid_pool(x, (2, 3)).square().sum(), x)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(device, layout):
    expected = ops.pyramid_pool(make((2, CHANNELS, 13, 9), "contiguous", torch.float64, device), (1, 2, 3, 6))
    torch.testing.assert_close(
        ops.pyramid_pool(make((2, CHANNELS, 13, 9), layout, torch.float64, device), (1, 2, 3, 6)), expected
    )


@pytest.mark.parametrize("with_concat", [False, True])
def test_gradcheck(device, with_concat):
    x = make((2, 3, 5, 4), "contiguous", torch.float64, device).requires_grad_()
    before = make((2, 5, 5, 4), "contiguous", torch.float64, device, seed=1).requires_grad_()

    def function(x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        concat = before.clone() if with_concat else None
        pooled = ops.pyramid_pool(x, (1, 2, 3), concat=concat, offset=1 if with_concat else 0)
        return (pooled, concat) if with_concat else (pooled, before.sum())

    assert torch.autograd.gradcheck(function, (x, before))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, layout, requires_grad):
    x = make((2, 4, 5, 7), layout, torch.float32, device).requires_grad_(requires_grad)
    concat = make((2, 6, 5, 7), "channels_last", torch.float32, device)
    forward, backward = torch.ops.pspnet_fast.pyramid_pool.default, torch.ops.pspnet_fast.pyramid_pool_backward.default
    torch.library.opcheck(forward, (x, None, 0, [1, 1, 2, 3]))
    torch.library.opcheck(forward, (x, concat, 2, [1, 1, 2, 3]))
    grad = torch.randn(2, 7, 4, device=device)
    torch.library.opcheck(backward, (grad, None, 0, [1, 1, 2, 3], 5, 7, layout == "channels_last"))
    torch.library.opcheck(backward, (grad, concat, 2, [1, 1, 2, 3], 5, 7, layout == "channels_last"))


def test_same_bits_every_run(device):
    x = make((2, CHANNELS, 61, 97), "contiguous", torch.float32, device)
    run = with_gradients(lambda x: ops.pyramid_pool(x, (1, 2, 3, 6)), 1)
    grad = torch.randn(2, 50, CHANNELS, device=device)
    first = run(x, grad)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(x, grad), strict=True))


def test_one_thread_gives_the_same_bits():
    x = make((1, CHANNELS, 61, 97), "channels_last", torch.float32, torch.device("cpu"))
    threads, many = torch.get_num_threads(), ops.pyramid_pool(x, (1, 2, 3, 6))
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.pyramid_pool(x, (1, 2, 3, 6)), many)
    finally:
        torch.set_num_threads(threads)


def test_empty_batch(device):
    x = torch.randn(0, 3, 5, 4, device=device, requires_grad=True)
    pooled = ops.pyramid_pool(x, (1, 2))
    assert pooled.shape == (0, 5, 3)
    assert torch.autograd.grad(pooled.sum(), x)[0].shape == x.shape


def test_constant_maps_and_infinity(device):
    """A mean of equal values is that value; an infinity stays in the bins that cover it."""
    x = torch.full((1, 2, 6, 6), 3.0, device=device)
    assert torch.equal(ops.pyramid_pool(x, (1, 2, 3, 6)), torch.full((1, 50, 2), 3.0, device=device))
    x[0, 0, 0, 0] = torch.inf
    assert torch.equal(ops.pyramid_pool(x, (2,))[0, :, 0].isinf().cpu(), torch.tensor([True, False, False, False]))


def test_the_gradient_of_the_gradient():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (ops, reference):
        (grad,) = torch.autograd.grad(module.pyramid_pool(x, (2,)).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x: (x[0], (1, 2)), ValueError, r"input must have shape \(N, C, H, W\), but has \(3, 5, 4\)"),
        (lambda x: (x.long(), (1, 2)), TypeError, "input must be float32, float64, bfloat16 or float16, but is int64"),
        (lambda x: ([1], (1, 2)), TypeError, "input must be a Tensor of shape .* but is a list"),
        (lambda x: (x[:, :, :0], (1, 2)), ValueError, "input must have C >= 1, H >= 1 and W >= 1"),
        (lambda x: (x, ()), ValueError, r"bins must have 1 to 16 levels, but \(\) has 0"),
        (lambda x: (x, (1,) * 17), ValueError, "bins must have 1 to 16 levels"),
        (lambda x: (x, (1, -2)), ValueError, r"bins must be from 1 to 4096, but \(1, -2\) holds -2"),
        (lambda x: (x, 6), TypeError, "bins must be a sequence of ints or pairs of ints"),
        (lambda x: (x, (1, 2.0)), TypeError, r"bins must hold ints or pairs of ints, but \(1, 2.0\) holds 2.0"),
        (lambda x: (x, ((1, 2, 3),)), TypeError, "bins must hold ints or pairs of ints"),
        (lambda x: (x, (4096, 4096)), ValueError, "bins must make at most 16777216 cells"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.pyramid_pool(*arguments(torch.randn(2, 3, 5, 4)))


@pytest.mark.parametrize(
    ("concat", "offset", "error", "message"),
    [
        (torch.zeros(2, 4, 5, 4), 2, ValueError, "offset must leave room for 3 channels in concat, which has 4"),
        (torch.zeros(2, 4, 5, 4), -1, ValueError, "offset must leave room .* from 0 to 1, but is -1"),
        (torch.zeros(2, 4, 5, 3), 0, ValueError, r"concat must have shape \(N, K, H, W\) = \(2, 4, 5, 4\)"),
        (torch.zeros(2, 4, 5, 4).double(), 0, TypeError, "concat must have the dtype of the first argument, float32"),
        (torch.zeros(2, 4, 5, 4, device="meta"), 0, ValueError, "concat must be on the device of the first argument"),
    ],
)
def test_bad_concat(concat, offset, error, message):
    with pytest.raises(error, match=message):
        ops.pyramid_pool(torch.randn(2, 3, 5, 4), (1, 2), concat=concat, offset=offset)


def test_the_raw_operator_never_reads_or_writes_outside():
    """Whoever goes around the Python checks gets an error, not memory that is not his."""
    x, raw = torch.randn(2, 3, 5, 4), torch.ops.pspnet_fast
    with pytest.raises(RuntimeError, match="concat has too few channels"):
        raw.pyramid_pool(x, torch.zeros(2, 3, 5, 4), 1, [1, 1])
    with pytest.raises(RuntimeError, match="concat has the wrong shape"):
        raw.pyramid_pool(x, torch.zeros(2, 3, 5, 3), 0, [1, 1])
    with pytest.raises(RuntimeError, match="bins must be from 1 to 4096"):
        raw.pyramid_pool(x, None, 0, [0, 1])
    with pytest.raises(RuntimeError, match="grad_pooled has the wrong shape"):
        raw.pyramid_pool_backward(torch.zeros(2, 3, 3), None, 0, [2, 2], 5, 4, False)
