"""The operators without our kernels: in plain products, for exports and for devices that have none."""

import copy
import warnings

import pytest
import torch
from cases import BINS, MANY_CELLS, WITHOUT_TENSORS, count
from foreign import assert_same
from toy_backbone import ToyBackbone

from pspnet_fast import PSPNet, UpsampleCrossEntropyLoss, ops, reference
from pspnet_fast.bench.stock import StockPPM
from pspnet_fast.ops import portable
from pspnet_fast.ops.checks import as_levels

DOUBLE = torch.float64
SIZES = [(1, 1), (3, 2), (13, 9), (24, 17)]  # fewer pixels than bins; bins that overlap
MODES = [{"align_corners": False}, {"align_corners": True}, {"mode": "nearest"}]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DOUBLE, requires_grad=True)


def assert_equal(function, *inputs: torch.Tensor) -> None:
    """Value and gradients of function(module), in Portable and of the reference."""
    with portable.Portable():
        ours = function(ops)(*inputs)
        ours_grads = torch.autograd.grad(ours, inputs, torch.cos(ours.detach()))
    truth = function(reference)(*inputs)
    grads = torch.autograd.grad(truth, inputs, torch.cos(truth.detach()))
    for a, b in zip([ours, *ours_grads], [truth, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", BINS)
def test_pooling(bins, size):
    def function(module):
        def run(x, before):
            concat = before.clone()
            return module.pyramid_pool(x, bins, concat=concat, offset=1).sum(1) + concat.sum((2, 3))[:, :4]

        return run

    assert_equal(lambda module: lambda x: module.pyramid_pool(x, bins), random(2, 4, *size))
    assert_equal(function, random(2, 4, *size), random(2, 7, *size))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", BINS)
def test_upsampling(bins, size, align_corners):
    def function(module):
        return lambda concat, reduced: module.pyramid_upsample_concat_(
            concat.clone(), reduced, bins, offset=1, align_corners=align_corners
        )

    assert_equal(function, random(2, 2 + 3 * len(bins), *size), random(2, count(bins), 3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", BINS)
def test_context(bins, size):
    for settings, (kernel, dilation) in zip(MODES, [(3, 1), (1, 1), ((5, 3), (2, 7))], strict=True):
        cells = (kernel * kernel) if isinstance(kernel, int) else kernel[0] * kernel[1]

        def function(module, kernel=kernel, dilation=dilation, settings=settings):
            return lambda conv, taps: module.pyramid_context_(
                conv.clone(), taps, bins, kernel, dilation=dilation, **settings
            )

        assert_equal(function, random(2, 3, *size), random(2, count(bins), cells, 3))


@pytest.mark.parametrize("case", MANY_CELLS)
def test_context_of_many_cells(case):
    size, bins, _, kernel, dilation = case
    cells = kernel * kernel if isinstance(kernel, int) else kernel[0] * kernel[1]
    for settings in MODES:

        def function(module, settings=settings):
            return lambda conv, taps: module.pyramid_context_(
                conv.clone(), taps, bins, kernel, dilation=dilation, **settings
            )

        assert_equal(function, random(1, 3, *size), random(1, count(bins), cells, 3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", [*BINS, MANY_CELLS[0][1], MANY_CELLS[1][1]])
def test_backward_operators(bins, size):
    """As the CPU's kernels give them."""
    flat, cells = [b for level in as_levels(bins) for b in level], count(bins)
    concat = torch.randn(2, 2 + 3 * len(bins), *size, dtype=DOUBLE).contiguous(memory_format=torch.channels_last)
    calls = [("pyramid_upsample_concat_backward", (concat, 1, 3, flat, True))]
    for last in (False, True):
        calls.append(("pyramid_pool_backward", (torch.randn(2, cells, 3, dtype=DOUBLE), concat, 1, flat, *size, last)))
    for interpolation, (kernel, dilation) in enumerate([([3, 3], [1, 1]), ([1, 1], [1, 1]), ([5, 3], [2, 7])]):
        calls.append(("pyramid_context_backward", (concat, flat, kernel, dilation, interpolation)))
    for name, arguments in calls:
        found = getattr(portable, name)(*arguments)
        truth = getattr(torch.ops.pspnet_fast, name)(*arguments)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
        assert name != "pyramid_pool_backward" or found.is_contiguous() == truth.is_contiguous()


@pytest.mark.parametrize("folded", [False, True])
def test_reduction(folded):
    bins = (1, (2, 3))

    def norm() -> tuple:
        return (*(torch.randn(4, dtype=DOUBLE) for _ in range(3)), torch.rand(4, dtype=DOUBLE) + 0.1, 1e-3)

    levels = [norm(), norm()] if folded else None
    pooled, weights = torch.randn(2, 7, 3, dtype=DOUBLE), [torch.randn(4, 3, dtype=DOUBLE) for _ in range(2)]
    with portable.Portable():
        ours = ops.pyramid_reduce(pooled, weights, bins, norm=levels, relu=True)
    torch.testing.assert_close(ours, reference.pyramid_reduce(pooled, weights, bins, norm=levels, relu=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Sums are taken in float32: the average of many large values is no overflow."""
    x = torch.full((1, 2, 90, 90), 60.0, dtype=dtype)
    with portable.Portable():
        pooled = ops.pyramid_pool(x, (1, 2))
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, torch.full((1, 5, 2), 60.0, dtype=dtype))


KEYS = ["MPS", "XPU", "HPU", "PrivateUse1"]


def operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return [n for n in names if n.startswith("pspnet_fast::") and not n.endswith((*WITHOUT_TENSORS,))]


def test_every_operator_runs_on_devices_without_kernels():
    assert len(operators()) >= 19
    for name in operators():
        for key in KEYS:
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), (name, key)


@pytest.fixture
def without_kernels():
    """The CPU as a device that the operators have no kernels for: what such a one runs is registered over them."""
    called, library = [], torch.library.Library("pspnet_fast", "IMPL")

    def noted(name, function):
        def run(*args):
            called.append(name)
            return function(*args)

        return run

    portable._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of registering over kernels
        for name, function in portable.OPERATORS.items():
            library.impl(name, noted(name, portable.fallback(function)), "CPU", allow_override=True)
    yield called
    library._destroy()


@pytest.mark.usefixtures("small_maps_as_large_ones")
@pytest.mark.parametrize("head", ["fused", "concat"])
def test_a_training_step(without_kernels, head):
    """Forward, loss and backward through the fallbacks give the CPU kernels' gradients, with one warning."""
    torch.manual_seed(0)
    model = PSPNet(5, ToyBackbone(), head=head).double().train()
    image, target = torch.randn(2, 3, 61, 50, dtype=DOUBLE), torch.randint(5, (2, 61, 50))

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        ours = copy.deepcopy(model)
        UpsampleCrossEntropyLoss()(ours(image)["out"], target).backward()
        return {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = step()
    assert {name for name in without_kernels if "backward" in name} == {
        *("pyramid_pool_backward", "pyramid_reduce_backward", "pyramid_batch_norm_backward"),
        *("upsample_cross_entropy_backward",),
        *(["pyramid_context_backward", "pyramid_split_weight_backward"] if head == "fused" else []),
        *(["pyramid_upsample_concat_backward"] if head == "concat" else []),
    }
    assert len([w for w in caught if "pspnet_fast has no kernels for cpu" in str(w.message)]) == 1
    model.head = "concat"
    model.ppm = StockPPM(model.ppm)
    assert_same(found, {name: grad for name, grad in step().items()}, 1e-8)
