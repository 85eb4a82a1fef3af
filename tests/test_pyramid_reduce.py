"""pyramid_reduce: values with and without folded norm, gradients, registration, bad input."""

import pytest
import torch
from cases import BINS, DTYPES, assert_accurate, count, with_gradients
from torch import Tensor

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")

CHANNELS = [(1, 1), (19, 5), (64, 16), (130, 37)]  # (C, R): single, odd, whole vectors, vectors and a rest


def make(bins, n: int, c: int, r: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(n, count(bins), c, generator=generator, dtype=torch.float64)
    weights = [torch.randn(r, c, generator=generator, dtype=torch.float64) / c**0.5 for _ in bins]
    return pooled.to(device, dtype), [w.to(device, dtype) for w in weights]


def make_norm(levels: int, r: int, dtype: torch.dtype, device: torch.device) -> list[tuple]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.rand(4, r, generator=generator, dtype=torch.float64) + 0.5 for _ in range(levels)]
    return [(*(row.to(device, dtype) for row in (d * torch.tensor([[1], [-1], [0.3], [1]]))), 1e-5) for d in draw]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("bins", BINS)
def test_values_and_gradients(device, bins, channels, dtype):
    pooled, weights = make(bins, 3, *channels, dtype, device)
    grad = torch.randn(3, count(bins), channels[1], dtype=torch.float64).to(device, dtype)
    run = [with_gradients(lambda p, *ws, m=m: m.pyramid_reduce(p, ws, bins), 1 + len(bins)) for m in (ops, reference)]
    assert_accurate(*run, pooled, *weights, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "r"), [(31, 72), (25, 104)])
def test_many_rows(device, n, r, dtype):
    """Tiles of both sizes for large batches, several along each axis and k, the last not whole."""
    bins, c = (1, 8), 152
    pooled, weights = make(bins, n, c, r, dtype, device)
    grad = torch.randn(n, count(bins), r, dtype=torch.float64).to(device, dtype)
    run = [with_gradients(lambda p, *ws, m=m: m.pyramid_reduce(p, ws, bins), 3) for m in (ops, reference)]
    assert_accurate(*run, pooled, *weights, grad)


@pytest.mark.parametrize("norm_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_folded_norm(device, relu, dtype, norm_dtype):
    bins = (1, 2, 3)
    pooled, weights = make(bins, 2, 70, 9, dtype, device)
    norm = make_norm(3, 9, norm_dtype or dtype, device)

    def run(module):
        def function(pooled: Tensor, *weights: Tensor) -> list[Tensor]:
            # stock batch norm takes parameters in float64 beside a float64 input, and in no other mixture of these
            wide = [tuple(t.to(pooled.dtype) for t in level[:4]) + level[4:] for level in norm]
            return [module.pyramid_reduce(pooled, weights, bins, norm=norm if module is ops else wide, relu=relu)]

        return function

    if dtype == torch.float64:
        ours, expected = run(ops)(pooled, *weights)[0], run(reference)(pooled, *weights)[0]
        return torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    ours = [t.double() for t in run(ops)(pooled, *weights)]
    exact = run(reference)(pooled.double(), *(w.double() for w in weights))
    stock = [t.double() for t in run(reference)(pooled, *weights)]
    error, baseline = (ours[0] - exact[0]).abs().max(), (stock[0] - exact[0]).abs().max()
    assert error <= 2 * baseline + torch.finfo(dtype).eps * exact[0].abs().max()
    assert not relu or ours[0].min() == 0


def test_weights_as_convolution_kernels(device):
    pooled, weights = make((1, 2), 2, 8, 4, torch.float32, device)
    kernels = [w[:, :, None, None].to(memory_format=torch.channels_last) for w in weights]
    assert torch.equal(ops.pyramid_reduce(pooled, kernels, (1, 2)), ops.pyramid_reduce(pooled, weights, (1, 2)))


def test_strided_arguments(device):
    pooled, weights = make((2, 3), 2, 8, 4, torch.float64, device)
    strided = pooled.transpose(1, 2).contiguous().transpose(1, 2), [w.T.contiguous().T for w in weights]
    torch.testing.assert_close(ops.pyramid_reduce(*strided, (2, 3)), ops.pyramid_reduce(pooled, weights, (2, 3)))


def test_gradcheck(device):
    pooled, weights = make((1, 2), 2, 5, 3, torch.float64, device)
    inputs = [t.requires_grad_() for t in (pooled, *weights)]
    assert torch.autograd.gradcheck(lambda p, *ws: ops.pyramid_reduce(p, ws, (1, 2)), inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    pooled, weights = make((1, 2), 2, 5, 3, torch.float32, device)
    inputs = [t.requires_grad_(requires_grad) for t in (pooled, *weights)]
    forward = torch.ops.pspnet_fast.pyramid_reduce.default
    torch.library.opcheck(forward, (inputs[0], inputs[1:], [], [], False, [1, 1, 2, 2]))
    detached = [t.detach() for t in inputs]
    norm = make_norm(2, 3, torch.float32, device)
    tensors, eps = [t for level in norm for t in level[:4]], [level[4] for level in norm]
    torch.library.opcheck(forward, (detached[0], detached[1:], tensors, eps, True, [1, 1, 2, 2]))
    backward = torch.ops.pspnet_fast.pyramid_reduce_backward.default
    torch.library.opcheck(backward, (torch.randn(2, 5, 3, device=device), detached[0], detached[1:], [1, 1, 2, 2]))


def test_same_bits_every_run(device):
    pooled, weights = make((1, 2, 3, 6), 2, 130, 37, torch.float32, device)
    run = with_gradients(lambda p, *ws: ops.pyramid_reduce(p, ws, (1, 2, 3, 6)), 5)
    grad = torch.randn(2, 50, 37, device=device)
    first = run(pooled, *weights, grad)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(pooled, *weights, grad), strict=True))


def test_empty_batch_has_zero_weight_gradients(device):
    pooled, weights = make((1, 2), 0, 5, 3, torch.float32, device)
    weights = [w.requires_grad_() for w in weights]
    reduced = ops.pyramid_reduce(pooled, weights, (1, 2))
    assert reduced.shape == (0, 5, 3)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(reduced.sum(), weights))


POOLED, WEIGHTS = torch.zeros(2, 5, 4), [torch.zeros(3, 4), torch.zeros(3, 4)]
NORM = (*(torch.ones(3) for _ in range(4)), 1e-5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((POOLED[0], WEIGHTS), {}, ValueError, r"pooled must have shape \(N, P, C\), but has \(5, 4\)"),
        ((POOLED[:, :4], WEIGHTS), {}, ValueError, r"pooled must have shape .* = \(2, 5, 4\), but has \(2, 4, 4\)"),
        ((POOLED, WEIGHTS[:1]), {}, ValueError, "weights must hold one tensor a level, 2 .* but holds 1"),
        ((POOLED, [WEIGHTS[0], torch.zeros(2, 4)]), {}, ValueError, r"weights\[1\] must have shape .* = \(3, 4\)"),
        ((POOLED, [WEIGHTS[0], torch.zeros(3, 5)]), {}, ValueError, r"weights\[1\] must have shape"),
        ((POOLED, [WEIGHTS[0].half(), WEIGHTS[1]]), {}, TypeError, r"weights\[0\] must have the dtype .* float32"),
        ((POOLED, WEIGHTS), {"norm": [NORM]}, ValueError, "norm must hold one tuple a level, 2 .* but holds 1"),
        ((POOLED, WEIGHTS), {"norm": [NORM, NORM[::-1]]}, TypeError, "norm must be a Tensor"),
        (
            (POOLED, WEIGHTS),
            {"norm": [NORM, (*(t[:2] for t in NORM[:4]), 1.0)]},
            ValueError,
            "norm must have shape",
        ),
        (
            (POOLED, WEIGHTS),
            {"norm": [NORM, (*(t.half() for t in NORM[:4]), 1.0)]},
            TypeError,
            "norm must be float32",
        ),
        ((POOLED.clone().requires_grad_(), WEIGHTS), {"relu": True}, ValueError, "norm and relu are for inference"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.pyramid_reduce(*arguments, (1, 2), **options)


def test_the_raw_operator_checks_too():
    with pytest.raises(RuntimeError, match="weights has the wrong shape"):
        torch.ops.pspnet_fast.pyramid_reduce(POOLED, [WEIGHTS[0], torch.zeros(3, 5)], [], [], False, [1, 1, 2, 2])
    with pytest.raises(RuntimeError, match="pooled must be"):
        torch.ops.pspnet_fast.pyramid_reduce(POOLED, WEIGHTS, [], [], False, [1, 1, 3, 3])
    with pytest.raises(RuntimeError, match="for inference"):
        torch.ops.pspnet_fast.pyramid_reduce(POOLED.clone().requires_grad_(), WEIGHTS, [], [], True, [1, 1, 2, 2])
