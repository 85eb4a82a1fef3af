"""upsample_cross_entropy: values, gradients, options, layouts, registration, determinism, memory, bad input."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, LAYOUTS, assert_accurate, make
from torch import Tensor

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")

# (K, h, w) -> (H, W): up, down, one pixel, integer and other scales, cells with more pixels than a batch of the kernels
SHAPES = [
    ((1, 4, 5), (9, 7)),
    ((19, 9, 8), (41, 62)),
    ((24, 9, 8), (65, 57)),
    ((150, 6, 5), (41, 33)),
    ((7, 33, 29), (10, 11)),
    ((5, 1, 1), (13, 60)),
    ((8, 6, 6), (1, 1)),
    ((8, 6, 6), (6, 6)),
    ((1000, 3, 3), (7, 6)),
]


def targets(k: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """(2, H, W) classes, a fifth of them ignored (255)."""
    target = torch.randint(0, min(k, 250), (2, *size))
    target[torch.rand(target.shape) < 0.2] = 255
    return target.to(device, dtype)


def loss_and_gradient(module, target: Tensor, **options):
    """logits -> [loss, its gradient], in the dtype of logits."""

    def run(logits: Tensor) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = module.upsample_cross_entropy(leaf, target, **options)
        grad = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
        (gradient,) = torch.autograd.grad(loss, leaf, grad)
        return [loss.detach().to(logits.dtype), gradient]

    return run


def assert_right(logits: Tensor, target: Tensor, **options) -> None:
    assert_accurate(*[loss_and_gradient(module, target, **options) for module in (ops, reference)], logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_values_and_gradient(device, shape, size, dtype):
    target = targets(shape[0], size, device)
    for align_corners, layout, reduction in itertools.product(
        (False, True), ("contiguous", "channels_last"), ("mean", "sum", "none")
    ):
        assert_right(make((2, *shape), layout, dtype, device), target, align_corners=align_corners, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_and_smoothing(device, weighted, label_smoothing, reduction):
    for dtype, k in ((torch.float32, 19), (torch.float64, 5), (torch.bfloat16, 33)):
        weight = torch.rand(k, device=device) if weighted else None
        options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
        assert_right(make((2, k, 5, 7), "contiguous", dtype, device), targets(k, (33, 20), device), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(device, layout, dtype):
    for k in (19, 24):
        logits = make((2, k, 9, 8), layout, dtype, device)
        assert_right(logits, targets(k, (33, 40), device), align_corners=False)
    (_, gradient) = loss_and_gradient(ops, targets(24, (33, 40), device))(logits)
    assert gradient.is_contiguous(
        memory_format=torch.channels_last if "channels_last" in layout else torch.contiguous_format
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_of_target(device, dtype):
    logits, target = make((2, 19, 5, 4), "contiguous", torch.float32, device), targets(19, (21, 30), device)
    for other in (target.to(dtype), target.to(dtype).mT.contiguous().mT):
        assert all(map(torch.equal, loss_and_gradient(ops, other)(logits), loss_and_gradient(ops, target)(logits)))


def test_another_ignore_index(device):
    logits, target = make((2, 5, 5, 4), "contiguous", torch.float32, device), targets(5, (21, 30), device)
    for index in (-100, 3):
        assert_right(logits, target.masked_fill(target == 255, index), ignore_index=index)


@pytest.mark.parametrize("options", [{}, {"weight": torch.tensor([0.0, 1, 1]), "label_smoothing": 0.1}])
def test_no_pixel_that_counts_gives_zero(device, options):
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    logits = torch.randn(2, 3, 4, 5, device=device)
    for reduction in ("mean", "sum", "none"):
        loss, grad = loss_and_gradient(ops, torch.full((2, 9, 9), 255, device=device), reduction=reduction, **options)(
            logits
        )
        assert not loss.any()
        assert not grad.any()
    loss, grad = loss_and_gradient(
        ops, torch.zeros(2, 9, 9, dtype=torch.int64, device=device), weight=torch.tensor([0.0, 1, 1], device=device)
    )(logits)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("gap", [30.0, 100.0, 1000.0])
def test_neighbours_of_very_different_classes(device, gap):
    """Between two pixels that are sure of different classes no class comes near the greatest logit of either."""
    logits = torch.randn(2, 20, 4, 4, device=device)
    logits[:, :, ::2] += gap * torch.nn.functional.one_hot(torch.tensor(3), 20).to(device)[:, None, None]
    logits[:, :, 1::2] += gap * torch.nn.functional.one_hot(torch.tensor(17), 20).to(device)[:, None, None]
    logits[:, :, :, 1] -= 50  # of all classes
    assert_right(logits, targets(20, (31, 29), device), reduction="none")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(device, value):
    logits = torch.randn(1, 20, 4, 4, device=device)
    logits[0, 2, 1, 1] = value
    target = torch.zeros(1, 13, 13, dtype=torch.int64, device=device)
    loss = ops.upsample_cross_entropy(logits, target, reduction="none")
    assert loss.isnan().any()
    assert not loss[:, 8:].isnan().any()
    assert ops.upsample_cross_entropy(logits, target).isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradcheck(device, align_corners, reduction):
    for size in ((7, 9), (2, 3)):
        logits = torch.randn(2, 4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
        weight = torch.rand(4, dtype=torch.float64, device=device)
        target = targets(4, size, device)
        assert torch.autograd.gradcheck(
            lambda z, weight=weight, target=target: ops.upsample_cross_entropy(
                z, target, None, align_corners, weight, 255, 0.1, reduction
            ),
            logits,
        )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(device, reduction, layout, requires_grad):
    raw, target = torch.ops.pspnet_fast, targets(5, (9, 7), device)
    for dtype in (torch.float64, torch.bfloat16):
        logits = make((2, 5, 4, 3), layout, dtype, device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        settings = (torch.ones(5, dtype=wide, device=device), True, 255, 0.1, reduction)
        loss, lse, total = raw.upsample_cross_entropy(logits, target, *settings)
        backward = (torch.ones_like(loss), logits, target, settings[0], lse, total, *settings[1:])
        torch.library.opcheck(raw.upsample_cross_entropy_backward.default, backward)
        torch.library.opcheck(
            raw.upsample_cross_entropy.default, (logits.requires_grad_(requires_grad), target, *settings)
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)  # the compiler knows no kernels
def test_compiles_with_dynamic_sizes(device):
    def function(logits, target):
        return ops.upsample_cross_entropy(logits * 2, target, align_corners=False, label_smoothing=0.1)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((4, 5), (6, 3)):
        logits = make((2, 5, *size), "contiguous", torch.float32, device).requires_grad_()
        target = targets(5, (3 * size[0], 19), device)
        losses = compiled(logits, target), function(logits, target)
        assert torch.equal(*losses)
        assert torch.equal(*[torch.autograd.grad(loss, logits)[0] for loss in losses])


def test_under_autocast(device):
    """The loss stays float32, the gradient takes the dtype of the logits."""
    logits = make((2, 5, 4, 5), "contiguous", torch.bfloat16, device).requires_grad_()
    target = targets(5, (20, 20), device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = ops.upsample_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ops.upsample_cross_entropy(logits, target))
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_every_run_and_with_one_thread(device, layout):
    logits, target = make((2, 40, 21, 19), layout, torch.float32, device), targets(40, (81, 70), device)
    run = loss_and_gradient(ops, target, label_smoothing=0.1)
    first, threads = run(logits), torch.get_num_threads()
    try:
        for number in (threads, 3, 1):
            torch.set_num_threads(number)
            assert all(map(torch.equal, first, run(logits)))
    finally:
        torch.set_num_threads(threads)


def test_empty_batch(device):
    logits = torch.empty(0, 8, 4, 5, device=device, requires_grad=True)
    loss = ops.upsample_cross_entropy(logits, torch.empty(0, 9, 9, dtype=torch.int64, device=device))
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 8, 4, 5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_derivative(device, reduction):
    """Its first order is that of the kernel, its second that of the reference."""
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    target, results = targets(3, (8, 9), device), []
    for module in (ops, reference):
        loss = module.upsample_cross_entropy(logits, target, label_smoothing=0.1, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.square().sum(), logits)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("value", [5, -1, 254])
def test_a_bad_target_is_told_on_a_cpu(device, value):
    target = torch.full((2, 9, 8), 255)
    target[1, 2, 3] = target[1, 7, 0] = value
    with pytest.raises(IndexError, match=rf"from 0 to 4 or ignore_index 255, but is {value} at pixel \(1, 2, 3\)"):
        ops.upsample_cross_entropy(torch.zeros(2, 5, 3, 3), target)


@pytest.mark.parametrize("device", ["cuda_on_cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("value", [5, -1, 254])
def test_a_bad_target_makes_nan_on_a_gpu(device, value):
    target = torch.full((2, 25, 25), 255, device=device)
    target[1, 2, 3] = value
    logits = torch.randn(2, 5, 4, 4, device=device)
    for reduction in ("mean", "sum"):
        assert ops.upsample_cross_entropy(logits, target, reduction=reduction).isnan()
    loss, grad = loss_and_gradient(ops, target, reduction="none")(logits)
    assert loss.isnan().nonzero().tolist() == [[1, 2, 3]]
    assert grad.isnan().any()
    assert not grad[0].isnan().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_a_bad_target_is_told_on_a_gpu_when_asked():
    target = torch.full((1, 9, 9), 7, device="cuda")
    with torch.autograd.set_detect_anomaly(True), pytest.raises(IndexError, match="but holds 7"):
        ops.upsample_cross_entropy(torch.zeros(1, 5, 3, 3, device="cuda"), target)


LOGITS, TARGET = torch.zeros(2, 5, 4, 3), torch.zeros(2, 9, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS[0], TARGET), {}, ValueError, r"logits must have shape \(N, C, H, W\)"),
        ((LOGITS.int(), TARGET), {}, TypeError, "logits must be float32"),
        ((LOGITS[:, :0], TARGET), {}, ValueError, "logits must have C >= 1"),
        ((LOGITS, TARGET.float()), {}, TypeError, "target must be a Tensor of uint8, .* but is torch.float32"),
        ((LOGITS, TARGET[:1]), {}, ValueError, r"target must have shape \(N, H, W\), N = 2, .* has \(1, 9, 8\)"),
        ((LOGITS, TARGET[:, :0]), {}, ValueError, "target must have shape"),
        ((LOGITS, TARGET.to("meta")), {}, ValueError, "target must be on the device of logits"),
        ((LOGITS, TARGET, (9, 9)), {}, ValueError, r"size must be that of target, \(9, 8\), but is \(9, 9\)"),
        ((LOGITS, TARGET), {"weight": torch.ones(4)}, ValueError, r"weight must have shape \(K,\) = \(5,\)"),
        ((LOGITS, TARGET), {"weight": torch.ones(5).int()}, TypeError, "weight must be a Tensor of floating-point"),
        ((LOGITS, TARGET), {"weight": torch.ones(5, device="meta")}, ValueError, "weight must be on the device"),
        ((LOGITS, TARGET), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be from 0 to 1, but is 1.5"),
        ((LOGITS, TARGET), {"reduction": "max"}, ValueError, "reduction must be one of 'none', 'mean', 'sum'"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.upsample_cross_entropy(*arguments, **options)


def test_the_raw_operator_checks_too():
    raw = torch.ops.pspnet_fast.upsample_cross_entropy
    with pytest.raises(RuntimeError, match="target must be uint8, int16, int32 or int64"):
        raw(LOGITS, TARGET.float(), None, True, 255, 0.0, 1)
    with pytest.raises(RuntimeError, match="weight has the wrong shape"):
        raw(LOGITS, TARGET, torch.ones(4), True, 255, 0.0, 1)
    with pytest.raises(RuntimeError, match="reduction must be 0, 1 or 2"):
        raw(LOGITS, TARGET, None, True, 255, 0.0, 3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
def test_memory() -> None:
    """One float a pixel and the gradient beside 8 MB, where stock PyTorch holds 268 MB several times."""
    script = """
import torch
from resident import resident
from pspnet_fast import ops, reference

def growth(module, size):
    before = resident("VmRSS")
    loss = module.upsample_cross_entropy(logits, target[:, :size, :size])
    grads = torch.autograd.grad(loss, logits)
    return resident("VmHWM") - before

logits = torch.randn(2, 150, 60, 60, requires_grad=True)
target = torch.randint(0, 150, (2, 473, 473), dtype=torch.uint8)
growth(ops, 8)
print(growth(ops, 473), growth(reference, 473))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    ours, stock = map(int, done.stdout.split())
    pixels, gradient = 4 * 2 * 473 * 473, 4 * 2 * 150 * 60 * 60
    assert ours < pixels + gradient + 8e6
    assert stock > 500e6, "the measure does not even see full-resolution logits"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_over_classes_without_weight_is_0(device, smoothing):
    logits = torch.randn(1, 2, 2, 3, device=device, requires_grad=True)
    target, weight = torch.zeros(1, 5, 7, dtype=torch.long, device=device), torch.tensor([0.0, 1.0], device=device)
    for module in (ops, reference):
        loss = module.upsample_cross_entropy(logits, target, None, True, weight, label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0, module
        assert not gradient.any(), module
