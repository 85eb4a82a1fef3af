"""FusedUpsampleConcat against the upsampling, concatenation and convolution of plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast import FusedUpsampleConcat, ops

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")
CHANNELS, SIZES = (3, 4, 130, 7), ((12, 13), (5, 7), (11, 12), (14, 2))


class Stock(nn.Module):
    """The same layers under the same names."""

    def __init__(self, fused: FusedUpsampleConcat) -> None:
        super().__init__()
        self.how = {"mode": "nearest"}
        if fused.mode == "bilinear":
            self.how = {"mode": "bilinear", "align_corners": fused.align_corners}
        self.conv, self.norm, self.activation = copy.deepcopy((fused.conv, fused.norm, fused.activation))

    def forward(self, maps: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        size = size or maps[0].shape[2:]
        upsampled = [F.interpolate(z, size, **self.how) for z in maps]
        return self.activation(self.norm(self.conv(torch.cat(upsampled, 1))))


def pair(kernel: int | tuple[int, int] = 3, dtype: torch.dtype = torch.float64, **arguments):
    """The module and its stock form, with statistics as after training."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    dilation = arguments.pop("dilation", 1)
    padding = tuple(k // 2 * dilation for k in kernel)
    bias = arguments.pop("bias", False)
    conv = nn.Conv2d(sum(CHANNELS), 6, kernel, padding=padding, dilation=dilation, bias=bias)
    layers = {"norm": nn.BatchNorm2d(6), "activation": nn.ReLU(inplace=True), **arguments}
    for norm in (m for m in layers.values() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    ours = FusedUpsampleConcat(conv, **layers).to(dtype)
    return ours, Stock(ours).to(dtype)


def make(layout: str = "contiguous", dtype: torch.dtype = torch.float64, sizes=SIZES, seed: int = 0) -> list[Tensor]:
    """The same maps at every call."""
    random = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, c, *size, dtype=dtype, generator=random) for c, size in zip(CHANNELS, sizes, strict=True)]
    return [z.to(memory_format=torch.channels_last) for z in maps] if layout == "channels_last" else maps


def outcome(module: nn.Module, maps: list[Tensor], grad: Tensor | None, *size: tuple[int, int]) -> dict[str, Tensor]:
    leaves = [z.detach().clone(memory_format=torch.preserve_format).requires_grad_(grad is not None) for z in maps]
    if grad is None:
        with torch.no_grad():
            return {"output": module(leaves, *size)}
    module.zero_grad()
    output = module(leaves, *size)
    output.backward(grad.expand_as(output))
    named = {f"map {i}": leaf.grad for i, leaf in enumerate(leaves)}
    named |= {name: p.grad for name, p in module.named_parameters()} | dict(module.named_buffers())
    return {"output": output.detach(), **named}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, truth in expected.items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("last", [(0,), (1, 2, 3), (0, 1, 2, 3), ()], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_the_layout_is_that_of_the_concatenation(last, training):
    """Of the result, and so of its gradient: torch's convolutions can take several times as long in the other."""
    ours, stock = (module.train(training) for module in pair(dtype=torch.float32))
    maps = [make("channels_last" if i in last else "contiguous", torch.float32)[i] for i in range(4)]
    results = [module(maps) for module in (ours, stock)]
    assert results[0].stride() == results[1].stride()


@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kernel": 1, "bias": True, "align_corners": True},
        {"kernel": (1, 5), "dilation": 2, "norm": None},
        {"norm": nn.GroupNorm(2, 6), "activation": None, "bias": True},
        {"norm": nn.BatchNorm2d(6, affine=False), "activation": nn.SiLU()},
    ],
    ids=["3x3", "1x1 aligned", "1x5 dilated", "group norm", "no affine"],
)
def test_equals_the_concatenated_form(arguments, layout, mode):
    ours, stock = (module.train(mode == "training") for module in pair(**arguments))
    maps = make(layout)
    grad = None if mode == "inference" else torch.randn(2, 6, *SIZES[0], dtype=torch.float64)
    results, expected = outcome(ours, maps, grad), outcome(stock, maps, grad)
    assert_same(results, expected)
    assert results["output"].stride() == expected["output"].stride()
    assert ours.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("training", [True, False])
def test_nearest(training, monkeypatch):
    """Where the sizes' fraction is one by a power of two; else as it stands."""
    taken, context = [], ops.pyramid_context_
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: taken.append(k["mode"]) or context(*a, **k))
    ours, stock = (module.train(training) for module in pair(mode="nearest"))
    grad = torch.randn(2, 6, 12, 16, dtype=torch.float64)
    for sizes, calls in [([(12, 16), (3, 4), (9, 8), (6, 2)], ["nearest"]), ([(12, 16), (5, 7), (3, 4), (2, 2)], [])]:
        taken.clear()
        maps = make(sizes=sizes)
        assert_same(outcome(ours, maps, grad), outcome(stock, maps, grad))
        assert taken == calls


def test_a_size_of_its_own():
    """Larger than every map, and smaller than some."""
    ours, stock = pair()
    for size in ((20, 17), (6, 6), (1, 1)):
        grad = torch.randn(2, 6, *size, dtype=torch.float64)
        assert_same(outcome(ours, make(), grad, size), outcome(stock, make(), grad, size))


def test_small_maps_are_convolved_as_they_are(monkeypatch):
    """Those of few cells or many channels; the result of the norm and activation comes out of the same operator."""
    taken, context = [], ops.pyramid_context_
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: taken.append((a[2], k)) or context(*a, **k))
    ours, stock = (module.eval() for module in pair())
    assert_same(outcome(ours, make(), None), outcome(stock, make(), None))
    ((bins, settings),) = taken
    assert bins == [(5, 7), (11, 12), (14, 2)]
    assert settings["relu"]
    assert settings["norm"] is not None


def test_layers_are_called_where_they_are_more_than_their_class():
    ours, stock = pair()
    for module in (ours, stock):
        module.conv.register_forward_hook(lambda _, args, output: output * 2)
        module.norm.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    grad = torch.randn(2, 6, *SIZES[0], dtype=torch.float64)
    assert_same(outcome(ours, make(), grad), outcome(stock, make(), grad))
    for module in (ours.eval(), stock.eval()):
        module.conv = nn.utils.parametrizations.weight_norm(module.conv)
    assert_same(outcome(ours, make(), None), outcome(stock, make(), None))


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    ours, stock = (module.train(training) for module in pair(bias=True, dtype=torch.float32))
    maps = make(dtype=torch.float32)
    exact = copy.deepcopy(stock).double()([z.double() for z in maps])
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = ours(maps), stock(maps)
    assert result.dtype == expected.dtype
    assert (result - exact).norm() <= 1.5 * (expected - exact).norm()


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training):
    ours, stock = (module.train(training) for module in pair())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 6, *SIZES[0], dtype=torch.float64)
    assert_same(outcome(compiled._orig_mod, make(), grad), outcome(stock, make(), grad))
    maps = make()
    torch.testing.assert_close(compiled(maps), stock(maps), rtol=1e-10, atol=1e-10)
    halves = [z[:, :, : z.size(2) // 2 + 1] for z in maps]
    torch.testing.assert_close(compiled(halves), stock(halves), rtol=1e-10, atol=1e-10)


def test_exports():
    """With the operator for fixed sizes, in plain torch for dynamic ones; and traces."""
    ours, stock = (module.eval() for module in pair())
    maps, other = make(), make(sizes=[(h + 3, w + 2) for h, w in SIZES])
    fixed = torch.export.export(ours, (maps,))
    assert "pyramid_context_" in str(fixed.graph)
    torch.testing.assert_close(fixed.module()(maps), stock(maps), rtol=1e-10, atol=1e-10)
    dynamic = [{2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} for _ in maps]
    program = torch.export.export(ours, (maps,), dynamic_shapes=(dynamic,))
    torch.testing.assert_close(program.module()(other), stock(other), rtol=1e-10, atol=1e-10)
    traced = torch.jit.trace(ours, (maps,), check_trace=False)
    torch.testing.assert_close(traced(maps), stock(maps), rtol=1e-10, atol=1e-10)


def test_forward_mode_and_functional_transforms():
    ours, stock = (module.eval() for module in pair())
    maps, tangents = make(), make(seed=1)
    for module in (ours, stock):
        module.requires_grad_(False)
    (_, a), (_, b) = (torch.func.jvp(lambda *z, m=m: m(list(z)), tuple(maps), tuple(tangents)) for m in (ours, stock))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Linear(4, 4), "conv must be an nn.Conv2d, but is a Linear"),
        (nn.Conv2d(4, 4, 3), "conv must be padded by"),
        (nn.Conv2d(4, 4, 2), "conv must have an odd kernel size"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "conv must be padded by"),
    ],
)
def test_convolutions_that_do_not_fit(conv, message):
    with pytest.raises(ValueError, match=message):
        FusedUpsampleConcat(conv)
    with pytest.raises(ValueError, match="mode must be 'bilinear' or 'nearest', but is 'bicubic'"):
        FusedUpsampleConcat(nn.Conv2d(4, 4, 1), mode="bicubic")


@pytest.mark.parametrize(
    ("shapes", "size", "message"),
    [
        ([], None, "maps must list at least one map"),
        ([(1, 2, 4, 4), (1, 3, 2, 2)], None, "maps must have 4 channels together"),
        ([(1, 2, 4, 4), (2, 2, 2, 2)], None, r"maps must be \(N, C, h, w\) with one N"),
        ([(1, 2, 4, 4), (1, 2, 2)], None, r"maps must be \(N, C, h, w\) with one N"),
        ([(1, 2, 4, 4), (1, 2, 2, 2)], (0, 4), r"size must be \(height, width\) of at least 1, but is \(0, 4\)"),
    ],
)
def test_maps_that_do_not_fit(shapes, size, message):
    module = FusedUpsampleConcat(nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=message):
        module([torch.zeros(shape) for shape in shapes], size)
