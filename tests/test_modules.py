"""FusedPPM against the pyramid pooling module of plain torch layers, in inference and in training."""

import copy
import itertools
import warnings

import pytest
import torch
from cases import make
from torch import Tensor, nn

from pspnet_fast import FusedPPM, pyramid
from pspnet_fast.bench.stock import StockPPM


def run(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output, the gradients of input and parameters, and the buffers after the step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad(set_to_none=True)
    output = module(x)
    output.backward(grad)
    results = {"output": output.detach(), "input": x.grad, **dict(module.named_buffers())}
    return results | {name: p.grad for name, p in module.named_parameters()}


def randomized(module: FusedPPM) -> FusedPPM:
    """Norms with statistics and affine parameters that are not the identity."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point() and ".1." not in name:
            with torch.no_grad():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "transposed"])
@pytest.mark.parametrize("concat", ["input_first", "input_last"])
@pytest.mark.parametrize(("bins", "align_corners"), [((1, 2, 3, 6), True), ((1, 3, 6, 8), False), ((2, (3, 1)), False)])
def test_equals_the_stock_module_in_float64(device, bins, align_corners, concat, layout, training):
    fused = randomized(FusedPPM(12, 5, bins, align_corners, concat)).to(device, torch.float64).train(training)
    stock = StockPPM(fused).to(device).train(training)
    x = make((3, 12, 13, 9), layout, torch.float64, device)
    grad = make((3, fused.out_channels, 13, 9), "contiguous", torch.float64, device, seed=1)
    ours, expected = run(fused, x, grad), run(stock, x, grad)
    for name in expected:
        torch.testing.assert_close(
            ours[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    with torch.no_grad():
        if not training:  # the folded path, of which autograd knows nothing
            torch.testing.assert_close(fused(x), expected["output"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_is_as_accurate_as_the_stock_module(device, layout, training, dtype):
    # a smooth activation: where a ReLU flips by one rounding, the gradient jumps, in both modules and by chance
    fused = randomized(FusedPPM(64, activation=nn.SiLU)).to(device, dtype).train(training)
    stock, exact = StockPPM(fused).train(training), StockPPM(fused).double().train(training)
    x = make((2, 64, 20, 17), layout, dtype, device)
    grad = make((2, 128, 20, 17), layout, dtype, device, seed=1)
    ours, eager, truth = run(fused, x, grad), run(stock, x, grad), run(exact, x.double(), grad.double())
    for name in truth:
        if not truth[name].is_floating_point():
            continue
        norm = truth[name].norm() + 1e-30
        error, baseline = (ours[name].double() - truth[name]).norm(), (eager[name].double() - truth[name]).norm()
        assert error <= 2 * baseline + torch.finfo(dtype).eps * norm, (name, error / norm, baseline / norm)


def test_state_dict_has_the_keys_of_semseg():
    module = FusedPPM(8)
    expected = set()
    for i in range(4):
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        expected |= {f"features.{i}.1.weight", *(f"features.{i}.2.{name}" for name in norm)}
    assert set(module.state_dict()) == expected
    assert module.features[0][1].weight.shape == (2, 8, 1, 1)
    assert module.out_channels == 16


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(device, memory_format):
    module = FusedPPM(8).to(device)
    x = torch.randn(2, 8, 7, 5, device=device).contiguous(memory_format=memory_format).requires_grad_()
    output = module(x)
    assert output.is_contiguous(memory_format=memory_format)
    output.sum().backward()
    assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "norm_layer",
    [
        nn.Identity,
        lambda r: nn.GroupNorm(1, r),
        nn.SyncBatchNorm,
        lambda r: nn.BatchNorm2d(r, affine=False),
        lambda r: nn.BatchNorm2d(r, track_running_stats=False),
        lambda r: nn.BatchNorm2d(r, momentum=None, eps=0.1),
    ],
)
@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.1), nn.Identity])
def test_other_norms_and_activations(norm_layer, activation):
    fused = randomized(FusedPPM(8, norm_layer=norm_layer, activation=activation)).double()
    for training in (True, False):
        fused.train(training)
        stock = StockPPM(fused).train(training)
        x, grad = (make((2, c, 6, 7), "contiguous", torch.float64, torch.device("cpu")) for c in (8, 16))
        ours, expected = run(fused, x, grad), run(stock, x, grad)
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), stock(x), rtol=1e-10, atol=1e-10)


def test_conversion_to_synchronised_batch_norm():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(FusedPPM(8))
    assert all(isinstance(level[2], nn.SyncBatchNorm) for level in module.features)
    assert module(torch.randn(2, 8, 6, 6)).shape == (2, 16, 6, 6)


def test_one_value_per_channel_uses_running_statistics_and_warns_once():
    module = randomized(FusedPPM(8))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        StockPPM(module)(torch.randn(1, 8, 6, 6))
    before = copy.deepcopy(module.state_dict())
    pyramid.warn_of_one_value.cache_clear()
    with pytest.warns(UserWarning, match="one value per channel"):
        module(torch.randn(1, 8, 6, 6)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(torch.randn(1, 8, 6, 6))
    after = module.state_dict()
    assert torch.equal(after["features.0.2.running_mean"], before["features.0.2.running_mean"])
    assert not torch.equal(after["features.1.2.running_mean"], before["features.1.2.running_mean"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(torch.randn(2, 8, 6, 6))


def test_frozen_norms_still_give_gradients():
    """Fine-tuning with norms in evaluation mode must not take the path that folds them."""
    module = randomized(FusedPPM(8)).eval()
    module(torch.randn(2, 8, 6, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)  # the compiler knows no kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device, training, dynamic):
    torch.compiler.reset()
    fused = randomized(FusedPPM(8)).to(device).train(training)
    backend = "aot_eager" if dynamic else "inductor"  # one compilation of C++ code is enough
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, dynamic=dynamic, backend=backend)
    for size in [(7, 5), (9, 8)] if dynamic else [(7, 5)]:
        x = torch.randn(2, 8, *size, device=device)
        grad = torch.randn(2, 16, *size, device=device)
        ours, expected = run(compiled, x, grad), run(fused, x, grad)
        for name in expected:
            torch.testing.assert_close(ours[name if "." not in name else f"_orig_mod.{name}"], expected[name])
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), fused(x))


def test_compiled_inference_copies_no_buffer():
    """The concatenation is written in place also where the compiler has made the graph functional."""
    torch.compiler.reset()
    module = FusedPPM(64).eval()
    x = torch.randn(1, 64, 30, 30)
    output_bytes = 2 * x.nbytes
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True)
        compiled(x)
        with torch.profiler.profile(profile_memory=True) as profile:
            compiled(x)
    allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert output_bytes <= allocated < 1.5 * output_bytes


def test_exports():
    module = randomized(FusedPPM(8)).eval()
    x = torch.randn(2, 8, 7, 5)
    height, width = (torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    program = torch.export.export(module, (x,), dynamic_shapes={"input": {2: height, 3: width}})
    for size in ((7, 5), (12, 20)):
        x = torch.randn(2, 8, *size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("training", [True, False])
def test_autocast_runs_in_the_dtype_of_the_input(device, training):
    module = randomized(FusedPPM(8)).to(device).train(training)
    x = torch.randn(2, 8, 6, 6, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert module(x).dtype == torch.float32
        low = module(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(x), rtol=0.05, atol=0.05)


def test_works_in_deterministic_mode_with_the_same_bits(device):
    torch.use_deterministic_algorithms(True)
    try:
        module = FusedPPM(32).to(device)
        x, grad = torch.randn(2, 32, 31, 29, device=device), torch.randn(2, 64, 31, 29, device=device)
        first, second = (run(copy.deepcopy(module), x, grad) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradient_of_a_concatenation_that_is_used_twice():
    """The output's gradient is handed on without a copy; other users of it must not notice."""
    module = FusedPPM(2, bins=(1, 2), activation=nn.Identity).double().eval()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (y := module(x)).square() + y, x)


def test_empty_batch():
    module = FusedPPM(8).eval()
    assert module(torch.randn(0, 8, 6, 6)).shape == (0, 16, 6, 6)


def test_meta_device_gives_shapes():
    assert FusedPPM(8).to("meta")(torch.empty(2, 8, 5, 4, device="meta")).shape == (2, 16, 5, 4)


def test_repr_names_the_arguments():
    assert "8, 2, bins=(1, 2, 3, 6), align_corners=True, concat='input_first'" in repr(FusedPPM(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be an int >= 1, but is 0"),
        ({"in_channels": 3}, "reduction_channels must be given where in_channels"),
        ({"in_channels": 8, "reduction_channels": -1}, "reduction_channels must be an int >= 1, but is -1"),
        ({"in_channels": 8, "bins": ()}, "bins must have 1 to 16 levels"),
        ({"in_channels": 8, "concat": "first"}, "concat must be one of 'input_first', 'input_last', but is 'first'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedPPM(**arguments)


def test_bad_input():
    module = FusedPPM(8)
    with pytest.raises(ValueError, match=r"input must have in_channels = 8 channels, but has shape \(2, 4, 5, 5\)"):
        module(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, H, W\)"):
        module(torch.randn(8, 5, 5))
    with pytest.raises(TypeError, match="input must be float32, float64, bfloat16 or float16, but is int64"):
        module(torch.zeros(2, 8, 5, 5, dtype=torch.long))
