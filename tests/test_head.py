"""FusedPSPHead against the pyramid, its concatenation and the bottleneck of plain torch layers."""

import copy

import pytest
import torch
from cases import make
from stock_head import StockHead, make_head
from torch import Tensor, nn

from pspnet_fast import FusedPPM, FusedPSPHead, PSPNet, head
from pspnet_fast.models.small import SmallBackbone

pytestmark = pytest.mark.usefixtures("fused")

CPU = torch.device("cpu")


@pytest.fixture
def fused(monkeypatch):
    """No test's map is too small for the fused form, but where a test asks for the choice itself."""
    monkeypatch.setattr(head, "concatenation_is_cheaper", lambda *_: False)


def run(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output, the gradients of input and parameters, and the buffers after the step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad(set_to_none=True)
    output = module(x)
    output.backward(grad.to(output.dtype))
    results = {"output": output.detach(), "input": x.grad, **dict(module.named_buffers())}
    return results | {name: p.grad for name, p in module.named_parameters()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to 1e-10 of the largest element, or of 1: a bias before a norm has no gradient but rounding errors."""
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        largest = truth.abs().max().item()
        torch.testing.assert_close(
            actual[name], truth, rtol=0, atol=1e-10 * max(largest, 1), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bins": (1, 3, 6, 8), "align_corners": False, "kernel_size": 1, "bias": True, "concat": "input_last"},
        {"bins": (2, (3, 1)), "align_corners": False, "kernel_size": (5, 3), "concat": "input_last"},
        {"dilation": 4, "bias": True, "norm": lambda n: nn.GroupNorm(1, n), "activation": nn.SiLU},
        {"norm": lambda _: nn.Identity()},
        {"activation": nn.SiLU, "norm": lambda n: nn.BatchNorm2d(n, affine=False)},
    ],
    ids=["psp", "1x1 bias", "pairs", "dilated group norm", "no norm", "no affine"],
)
def test_equals_the_concatenated_form_in_float64(device, arguments, layout, training):
    module = make_head(**arguments).to(device, torch.float64).train(training)
    stock = StockHead(module).to(device).train(training)
    for size in ((13, 9), (3, 2)):
        x = make((3, 8, *size), layout, torch.float64, device)
        grad = make((3, 6, *size), "contiguous", torch.float64, device, seed=1)
        expected = run(stock, x, grad)
        assert_equal(run(module, x, grad), expected)
        if not training:  # the folded path, of which autograd knows nothing
            with torch.no_grad():
                assert_equal({"output": module(x)}, {"output": expected["output"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_error_is_at_most_a_fifth_above_that_of_the_concatenated_form(device, layout, mode, dtype):
    """The maps and the convolution's weight each, the other tensors of few numbers each together, against float64."""
    # a smooth activation: where a ReLU flips by one rounding, the gradient jumps, in both modules and by chance
    module = make_head(64, 64, 64, activation=nn.SiLU).to(device, dtype).train(mode == "training")
    stock, exact = StockHead(module), StockHead(module).double()
    stock.train(module.training), exact.train(module.training)
    x, grad = (make((4, 64, 30, 30), layout, dtype, device, seed) for seed in (0, 1))
    if mode == "inference":
        with torch.no_grad():
            results = [{"output": m(i)} for m, i in ((module, x), (stock, x), (exact, x.double()))]
    else:
        results = [run(module, x, grad), run(stock, x, grad), run(exact, x.double(), grad.double())]
    *both, truth = [{n: t.double() for n, t in result.items() if t.is_floating_point()} for result in results]
    large = {"output", "input", "bottleneck.0.weight"} & truth.keys()
    for names in [*({name} for name in large), truth.keys() - large]:
        ours, eager = (sum(((t[n] - truth[n]).norm() / truth[n].norm()) ** 2 for n in names) ** 0.5 for t in both)
        assert ours <= 1.2 * eager, (names, ours, eager)


def test_state_dict_has_the_keys_of_the_pair_and_shares_its_parameters():
    ppm, bottleneck = FusedPPM(8), nn.Sequential(nn.Conv2d(16, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    pair, module = nn.ModuleDict({"ppm": ppm, "bottleneck": bottleneck}), FusedPSPHead(ppm, *bottleneck)
    assert list(module.state_dict()) == list(pair.state_dict())
    assert all(a is b for a, b in zip(module.parameters(), pair.parameters(), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(device, layout):
    module = make_head().to(device, memory_format=layout)
    x = torch.randn(2, 8, 7, 5, device=device).contiguous(memory_format=layout).requires_grad_()
    output = module(x)
    assert output.is_contiguous(memory_format=layout)
    output.sum().backward()
    assert x.grad.is_contiguous(memory_format=layout)


def test_conversion_to_synchronised_batch_norm():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(make_head())
    assert isinstance(module.bottleneck[1], nn.SyncBatchNorm)
    assert module(torch.randn(2, 8, 9, 9)).shape == (2, 6, 9, 9)
    with torch.no_grad():
        x = torch.randn(2, 8, 9, 9)
        torch.testing.assert_close(module.eval()(x), StockHead(module).eval()(x))


def test_frozen_norms_still_give_gradients():
    module = make_head(activation=nn.SiLU).eval()
    module(torch.randn(2, 8, 9, 9)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)  # the compiler knows no kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device, training, dynamic):
    torch.compiler.reset()
    module = make_head().to(device).train(training)
    backend = "aot_eager" if dynamic else "inductor"  # one compilation of C++ code is enough
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=dynamic, backend=backend)
    for size in [(17, 15), (9, 18)] if dynamic else [(17, 15)]:
        x, grad = torch.randn(2, 8, *size, device=device), torch.randn(2, 6, *size, device=device)
        ours, expected = run(compiled, x, grad), run(module, x, grad)
        for name in expected:
            torch.testing.assert_close(
                ours[name if "." not in name else f"_orig_mod.{name}"], expected[name], rtol=1e-4, atol=1e-4
            )
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


def test_exports():
    module = make_head().eval()
    height, width = (torch.export.Dim(name, min=2, max=64) for name in ("height", "width"))
    shapes = {"input": {2: height, 3: width}}
    program = torch.export.export(module, (torch.randn(2, 8, 17, 15),), dynamic_shapes=shapes)
    for size in ((17, 15), (12, 20), (3, 4)):
        x = torch.randn(2, 8, *size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_the_dtype_of_the_convolution(device, training):
    module = make_head().to(device).train(training)
    x = torch.randn(2, 8, 16, 16, device=device)
    for enabled in (True, False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            output = module(x)
            with torch.no_grad():
                assert module(x).dtype == (torch.bfloat16 if enabled else torch.float32)
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        output.sum().backward()
    assert module.bottleneck[0].weight.grad.dtype == torch.float32
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(module(x), StockHead(module).train(training)(x), rtol=0.05, atol=0.05)


def test_same_bits_every_run_in_deterministic_mode(device, poison):
    module = make_head(32, 8, 16).to(device)
    x, grad = torch.randn(2, 32, 31, 29, device=device), torch.randn(2, 16, 31, 29, device=device)
    first, second = (run(copy.deepcopy(module), x, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(value.isnan().any() for value in first.values())


def test_gradcheck():
    module = make_head(2, 2, 2, (1, 2), activation=nn.Softplus).double().eval()
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = module.bottleneck[0].weight

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"bottleneck.0.weight": weight}, x)

    assert torch.autograd.gradcheck(function, (x, weight))


def test_empty_batch():
    module = make_head().eval()
    assert module(torch.randn(0, 8, 16, 16)).shape == (0, 6, 16, 16)


def test_meta_device_gives_shapes():
    assert make_head().to("meta")(torch.empty(2, 8, 16, 16, device="meta")).shape == (2, 6, 16, 16)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(27, 6, 3, padding=1), "conv must have the ppm's 28 channels as input, but has 27"),
        (nn.Conv2d(28, 6, 2, padding=1), "conv must have an odd kernel size, stride 1 and one group"),
        (nn.Conv2d(28, 6, 3, padding=1, stride=2), "conv must have an odd kernel size, stride 1 and one group"),
        (nn.Conv2d(28, 4, 3, padding=1, groups=2), "conv must have an odd kernel size, stride 1 and one group"),
        (nn.Conv2d(28, 6, 3), r"conv must be padded by \(1, 1\) zeros"),
        (nn.Conv2d(28, 6, 3, padding=1, padding_mode="reflect"), r"conv must be padded by \(1, 1\) zeros"),
        (nn.Linear(28, 6), "conv must be an nn.Conv2d, but is a Linear"),
    ],
)
def test_bad_convolution(conv, message):
    with pytest.raises(ValueError, match=message):
        FusedPSPHead(FusedPPM(8, 5), conv)


def test_bad_input():
    with pytest.raises(ValueError, match=r"input must have in_channels = 8 channels, but has shape \(2, 4, 16, 16\)"):
        make_head()(torch.randn(2, 4, 16, 16))
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, H, W\)"):
        make_head()(torch.randn(8, 16, 16))


def test_the_cheaper_form_is_chosen(monkeypatch):
    monkeypatch.undo()
    module, calls = make_head().eval(), []
    stock = StockHead(module).eval()
    products = head.level_products
    monkeypatch.setattr(head, "level_products", lambda *a: calls.append(1) or products(*a))
    for size, fused in (((60, 60), 1), ((2, 2), 0)):
        calls.clear()
        x = torch.randn(1, 8, *size)
        with torch.no_grad():
            torch.testing.assert_close(module(x), stock(x))
        assert len(calls) == fused


@pytest.mark.parametrize("training", [True, False])
def test_pspnet_is_the_same_with_either_head(training):
    torch.manual_seed(0)
    arguments = {"classes": 3, "bins": (1, 2, 3), "dropout": 0.0}
    models = [
        PSPNet(backbone=SmallBackbone(12), head=kind, **arguments).train(training) for kind in ("fused", "concat")
    ]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 64, 64)
    outputs = [model(x)["out"] for model in models]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_pspnet_refuses_other_heads():
    with pytest.raises(ValueError, match="head must be one of 'fused', 'concat', got 'plain'"):
        PSPNet(3, "resnet18", head="plain")


@pytest.mark.parametrize("align_corners", [False, True])
def test_derivatives_of_every_order_and_transforms(align_corners):
    torch.manual_seed(0)
    module = make_head(4, 3, 2, bins=(1, 2), align_corners=align_corners, activation=nn.Tanh).double().eval()
    stock, x = StockHead(module).eval(), torch.randn(2, 4, 5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(module, x.requires_grad_(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(module, x, fast_mode=True)
    for transform in (
        lambda m: torch.func.hessian(lambda v: m(v).square().sum())(x.detach()[:1]),
        lambda m: torch.func.vmap(m)(x.detach()[:, None]),
        lambda m: torch.func.jvp(torch.func.grad(lambda v: m(v).sum()), (x.detach(),), (x.detach(),))[1],
    ):
        torch.testing.assert_close(transform(module), transform(stock), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_gradients_reach_all_parameters(training, batched):
    results = []
    module = make_head().double().train(training)
    for m in (module, StockHead(module).train(training)):
        x = torch.randn(2, 8, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = m(x)
        if batched:
            wanted = [x, m.bottleneck[0].weight, m.ppm.features[1][1].weight]
            directions = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
            results.append(torch.autograd.grad(y, wanted, directions, is_grads_batched=True))
            continue
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append([p.grad for p in m.parameters()] + [x.grad])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
