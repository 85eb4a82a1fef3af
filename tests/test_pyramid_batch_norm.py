"""pyramid_batch_norm: values, gradients and running statistics against torch's batch norm, registration, bad input."""

import pytest
import torch
import torch.nn.functional as F
from cases import BINS, DTYPES, count, with_gradients
from torch import Tensor

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")

RAW = [1, 1, 2, 2]
CPU = torch.device("cpu")
raw = torch.ops.pspnet_fast


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


def make_running(levels: int, r: int, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    means, variances = (
        draw(levels, r, dtype=dtype, device=device, seed=2),
        torch.rand(levels, r, dtype=dtype, generator=torch.Generator().manual_seed(4)) + 0.5,
    )
    return list(zip(means.unbind(), variances.to(device).unbind(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 5, 37, 130])
@pytest.mark.parametrize("bins", BINS)
def test_values_and_gradients(device, bins, r, dtype):
    """Without ReLU: where one flips by a rounding, the gradient jumps. Levels take turns in training and evaluation."""
    levels = len(bins)
    reduced = draw(3, count(bins), r, dtype=dtype, device=device)
    affine = [draw(r, dtype=dtype, device=device, seed=i) for i in range(1, 2 * levels + 1)]
    grad = draw(3, count(bins), r, dtype=dtype, device=device, seed=99)
    running = make_running(levels, r, dtype, device)
    training = [i % 2 == 0 for i in range(levels)]

    def of(module):
        def function(reduced: Tensor, *affine: Tensor) -> Tensor:
            statistics = [tuple(t.to(reduced.dtype).clone() for t in pair) for pair in running]
            norm = [(affine[i], affine[levels + i], *statistics[i], 1e-3) for i in range(levels)]
            return module.pyramid_batch_norm(reduced, bins, norm, training=training, momentum=[0.1] * levels)

        return with_gradients(function, 1 + 2 * levels)

    inputs = [reduced, *affine, grad]
    results = of(ops)(*inputs), of(reference)(*inputs), of(reference)(*[t.double() for t in inputs])
    terms = grad.double().abs().sum((0, 1)).max().item()  # of the sums, each of about so much
    for ours, stock, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        error, baseline = ((t.double() - truth).abs().max().item() for t in (ours, stock))
        largest = truth.abs().max().item()
        if dtype == torch.float64:  # the truth itself: only the order of operations shows
            assert error <= 64 * torch.finfo(dtype).eps * max(largest, terms), (error, largest, terms)
        else:
            summing = torch.finfo(torch.float32).eps * terms / 4
            assert error <= 2 * baseline + torch.finfo(dtype).eps * largest + summing, (error, baseline, largest, terms)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_reference_is_batch_norm(affine, training):
    reduced = draw(3, 9, 5, dtype=torch.float64, device=CPU).requires_grad_()
    weight, bias = (draw(5, dtype=torch.float64, device=CPU, seed=i) if affine else None for i in (1, 2))
    results = []
    for ours in (True, False):
        ((mean, var),) = make_running(1, 5, torch.float64, CPU)
        if ours:
            norm = [(weight, bias, mean, var, 0.1)]
            y = reference.pyramid_batch_norm(reduced, (3,), norm, training=[training], momentum=[0.3], relu=True)
        else:
            z = reduced.flatten(0, 1)
            y = F.batch_norm(z, mean, var, weight, bias, training, 0.3, 0.1).relu().view(reduced.shape)
        results.append([y, mean, var, *torch.autograd.grad(y.sin().sum(), reduced)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("own", [True, False])  # or float32; in float64 torch takes no mixture
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_relu_and_its_gradient(device, affine, dtype, own):
    bins, r, momentum = (1, (2, 3), 4), 70, [0.1, 0.5, 1.0]
    kind = dtype if own or dtype == torch.float64 else torch.float32
    reduced, grad = (draw(2, count(bins), r, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weights = [draw(r, dtype=kind, device=device, seed=i) for i in range(6)] if affine else [None] * 6
    results = []
    for module, wide in ((ops, dtype), (reference, dtype), (reference, torch.float64)):
        sizes = kind if wide == dtype else wide
        running = [(m.to(sizes), v.to(sizes)) for m, v in make_running(3, r, kind, device)]
        norm = [
            (*(None if w is None else w.to(sizes) for w in weights[2 * i : 2 * i + 2]), *running[i], 1e-5)
            for i in range(3)
        ]
        leaf = reduced.detach().to(wide).requires_grad_()
        y = module.pyramid_batch_norm(leaf, bins, norm, training=[True, True, False], momentum=momentum, relu=True)
        y.backward(grad.to(wide))
        results.append([y.detach(), leaf.grad, *(t for pair in running for t in pair)])
    for i, (ours, stock, truth) in enumerate(zip(*results, strict=True)):
        ours, stock = ours.double(), stock.double()
        rounding = torch.finfo(kind if i > 1 else dtype).eps * truth.abs().max()
        rounding *= 64 if dtype == torch.float64 else 1  # there only the order of operations shows
        error, baseline = (ours - truth).abs().max(), (stock - truth).abs().max()
        if i == 1:  # a ReLU flips by one rounding, in either
            error, baseline = (ours - truth).abs().median(), (stock - truth).abs().median()
        assert error <= 2 * baseline + rounding, (i, error, baseline)
    assert results[0][0].min() == 0
    assert torch.equal(*(t[6].double() for t in results[:2]))  # of a level in evaluation
    assert not torch.equal(results[0][2].double(), make_running(3, r, kind, device)[0][0].double())


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_mean_far_from_zero_costs_no_accuracy(device, offset):
    """The variance is that of deviations, not a difference of squares."""
    reduced = draw(4, 36, 8, dtype=torch.float32, device=device) + offset
    run = [
        m.pyramid_batch_norm(t, (6,), [(None, None, None, None, 0.0)], training=[True], momentum=[0.1]).double()
        for m, t in ((ops, reduced), (reference, reduced.double()))
    ]
    torch.testing.assert_close(*run, rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_pass(device):
    reduced = torch.zeros(2, 4, 3, device=device)
    reduced[0, 0, 0], reduced[0, 1, 1] = torch.nan, torch.inf
    norm = [(None, None, torch.zeros(3, device=device), torch.ones(3, device=device), 0.0)]
    for training in (True, False):
        ours, expected = (
            m.pyramid_batch_norm(reduced, (2,), norm, training=[training], momentum=[0.0], relu=True)
            for m in (ops, reference)
        )
        assert torch.equal(ours.isnan(), expected.isnan())


def make(device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, list, list]:
    reduced = draw(2, 5, 3, dtype=dtype, device=device, seed=seed)
    affine = [draw(3, dtype=dtype, device=device, seed=i) for i in range(4)]
    return reduced, affine, [t.clone() for pair in make_running(2, 3, dtype, device) for t in pair]


def test_strided_arguments(device):
    reduced, affine, running = make(device)
    strided = reduced.transpose(0, 2).contiguous().transpose(0, 2)
    wide = [t.repeat_interleave(2)[::2] for t in affine]
    results = [
        raw.pyramid_batch_norm(x, w[:2], w[2:], running[::2], running[1::2], [0, 0], [0.1] * 2, [0.1] * 2, True, RAW)
        for x, w in ((reduced, affine), (strided, wide))
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("batch", [[1, 1], [1, 0]])
def test_gradcheck(device, batch):
    reduced, affine, running = make(device)
    leaves = [t.requires_grad_() for t in (reduced, *affine)]

    def function(reduced, *affine):
        copies = [t.clone() for t in running]
        return raw.pyramid_batch_norm(
            reduced, affine[:2], affine[2:], copies[::2], copies[1::2], batch, [0.1] * 2, [0.1] * 2, False, RAW
        )[0]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    reduced, affine, running = make(device, torch.float32)
    leaves = [t.requires_grad_(requires_grad) for t in (reduced, *affine)]
    settings = [0, 1], [0.1, 0.5], [1e-5, 1e-3], True, RAW
    torch.library.opcheck(
        raw.pyramid_batch_norm.default, (leaves[0], leaves[1:3], leaves[3:], running[::2], running[1::2], *settings)
    )
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(raw.pyramid_batch_norm.default, (plain[0], [], [], [], [], [1, 1], *settings[1:]))
    statistics = torch.rand(2, 2, 3, device=device)
    backward = plain[0].cos(), plain[0], plain[0].sin(), plain[1:3], statistics, [0, 1], [1e-5, 1e-3], RAW
    torch.library.opcheck(raw.pyramid_batch_norm_backward.default, backward)


def test_versions_count_what_is_written(device):
    """And nothing else: a norm in evaluation may have been kept for some backward."""
    reduced, affine, running = make(device)
    before = [t._version for t in running]
    raw.pyramid_batch_norm(
        reduced, affine[:2], affine[2:], running[::2], running[1::2], [0, 1], [0.1] * 2, [0.1] * 2, True, RAW
    )
    assert [t._version - b for t, b in zip(running, before, strict=True)] == [0, 0, 1, 1]


def test_same_bits_every_run(device):
    bins = (1, 2, 3, 6)
    reduced, grad = (draw(2, 50, 37, dtype=torch.float32, device=device, seed=seed) for seed in (0, 1))
    norm = [(torch.ones(37, device=device), torch.zeros(37, device=device), None, None, 0.1) for _ in bins]
    run = with_gradients(
        lambda z: ops.pyramid_batch_norm(z, bins, norm, training=[True] * 4, momentum=[0.1] * 4, relu=True), 1
    )
    first = run(reduced, grad)
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(reduced, grad), strict=True))


def test_empty_batch(device):
    _, affine, running = make(device)
    leaves = [t.requires_grad_() for t in (torch.zeros(0, 5, 3, dtype=torch.float64, device=device), *affine)]
    before = [t.clone() for t in running]
    y, _ = raw.pyramid_batch_norm(
        leaves[0], leaves[1:3], leaves[3:], running[::2], running[1::2], [1, 0], [0.1] * 2, [0.1] * 2, True, RAW
    )
    assert y.shape == (0, 5, 3)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(y.sum(), leaves))
    assert all(map(torch.equal, running, before))


REDUCED, R = torch.zeros(2, 5, 3), torch.ones(3)
NORM, FREE = (R, R, R.clone(), R.clone(), 0.1), (R, R, None, None, 0.1)
OTHER = (R, R, R.clone(), R.clone(), 0.1)
LINE = torch.zeros(60)
EVERY_OTHER = LINE.view(2, 5, 6)[:, :, ::2]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((REDUCED[0], [NORM, OTHER]), {}, ValueError, r"reduced must have shape \(N, P, R\), but has \(5, 3\)"),
        ((REDUCED[:, :4], [NORM, OTHER]), {}, ValueError, r"reduced must have shape .* = \(2, 5, 3\)"),
        ((REDUCED[:, :, :0], [NORM, OTHER]), {}, ValueError, "reduced must have R >= 1"),
        ((REDUCED, [NORM]), {}, ValueError, "norm must hold one entry a level, 2 .* but holds 1"),
        ((REDUCED, 3), {}, TypeError, "norm must hold one entry a level, but is 3"),
        ((REDUCED, [NORM, OTHER[:4]]), {}, TypeError, r"norm must hold \(weight, bias, running_mean, running_var, eps"),
        ((REDUCED, [NORM, FREE]), {}, ValueError, "running_mean of norm must be given for all levels or for none"),
        ((REDUCED, [(R, None, *NORM[2:])] * 2), {}, ValueError, "norm must have weight and bias, .* both or neither"),
        ((REDUCED, [NORM, (R[:2], *OTHER[1:])]), {}, ValueError, "weight of norm must have shape"),
        ((REDUCED, [NORM, (R.half(), *OTHER[1:])]), {}, TypeError, "norm must be float32 or torch.float32 throughout"),
        ((REDUCED, [FREE, FREE]), {"training": [True, False]}, ValueError, "training must be True in every level"),
        ((REDUCED[:1], [NORM, OTHER]), {}, ValueError, r"training: a level of bins \(1, 1\) has one value a channel"),
        ((REDUCED, [NORM, OTHER]), {"training": [1, 0]}, TypeError, "training must be True or False, but is 1"),
        ((REDUCED, [NORM, OTHER]), {"momentum": [0.1, None]}, TypeError, "momentum must be a number, but is None"),
        ((REDUCED, [NORM, OTHER]), {"relu": 1}, TypeError, "relu must be True or False, but is 1"),
        ((REDUCED, [NORM, NORM]), {}, RuntimeError, "running statistics, which are written to, share memory"),
        ((EVERY_OTHER, [(*NORM[:2], LINE[56:59], NORM[3], 0.1), OTHER]), {}, RuntimeError, "written to, share memory"),
        ((REDUCED, [(LINE[:3], R, LINE[2:5], NORM[3], 0.1), OTHER]), {}, RuntimeError, "written to, share memory"),
        (
            (REDUCED, [NORM, (R, R, torch.ones(6)[::2], OTHER[3], 0.1)]),
            {},
            RuntimeError,
            "running statistics must be contiguous",
        ),
    ],
)
def test_bad_input(arguments, options, error, message):
    reduced, norm = arguments
    with pytest.raises(error, match=message):
        ops.pyramid_batch_norm(reduced, (1, 2), norm, **({"training": [True, True], "momentum": [0.1, 0.1]} | options))


def test_running_statistics_beside_an_expanded_map_are_no_part_of_it():
    line = torch.randn(9)
    reduced, apart = line[:3].expand(2, 5, 3), torch.randn(2, 5, 3).copy_(line[:3])
    options = {"training": [True, True], "momentum": [0.1, 0.1]}
    results = []
    for x, mean in ((apart, line[3:6].clone()), (reduced, line[3:6])):
        y = ops.pyramid_batch_norm(x, (1, 2), [(R, R, mean, NORM[3].clone(), 1e-5), OTHER], **options)
        results.append((y, mean))
    assert all(map(torch.equal, *results))


def test_the_raw_operator_checks_too():
    lists = [[R, R], [R, R], [NORM[2], OTHER[2]], [NORM[3], OTHER[3]]]
    rest = [0.1] * 2, [0.1] * 2, True, RAW
    with pytest.raises(RuntimeError, match="weights has the wrong shape"):
        raw.pyramid_batch_norm(REDUCED, [R, torch.ones(2)], *lists[1:], [1, 1], *rest)
    with pytest.raises(RuntimeError, match="momentum and eps must list one number a level"):
        raw.pyramid_batch_norm(REDUCED, *lists, [1], *rest)
    with pytest.raises(RuntimeError, match="neither statistics of its batch nor running ones"):
        raw.pyramid_batch_norm(REDUCED, *lists[:2], [], [], [1, 0], *rest)
    with pytest.raises(RuntimeError, match="one value a channel"):
        raw.pyramid_batch_norm(REDUCED[:1], *lists, [1, 1], *rest)
    with pytest.raises(RuntimeError, match="statistics must be what pyramid_batch_norm has given"):
        raw.pyramid_batch_norm_backward(REDUCED, REDUCED, None, [R, R], torch.ones(2, 2, 4), [1, 1], [0.1] * 2, RAW)
