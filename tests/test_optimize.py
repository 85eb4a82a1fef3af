"""optimize: outputs are the model's, whatever it is and is given, and the model stays as it is."""

import copy
import io
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from foreign import MODELS
from metadata_tensor import Noted, notes_of
from pairs import fused, head, ppm, pspnet, pspnet_concat
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from toy_backbone import ToyBackbone

from pspnet_fast import FusedPPM, FusedPSPHead, PSPNet, fuse, optimize
from pspnet_fast.models.resnet import BasicBlock, Bottleneck, resnet
from pspnet_fast.optimization import packed, winograd
from pspnet_fast.optimization.graphs import MOST, Graphs
from pspnet_fast.optimization.head import FrozenPSPHead
from pspnet_fast.optimization.packed import PackedConvolution

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones", "one_thread")
SIZES = [(3, 8, 11, 9), (1, 8, 13, 6), (2, 8, 1, 1), (1, 8, 24, 16)]


def settled(model: nn.Module) -> nn.Module:
    """In evaluation, with norms that are no identities."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.3)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def assert_close(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """To 1e-5 of the greatest in float32."""
    tolerance = tolerance or {torch.float32: 1e-5, torch.float64: 1e-12}[expected.dtype]
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


class Calls:
    """Counts what packed convolutions run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[bool, bool, bool]] = []  # norm, sum, relu
        own = PackedConvolution.__call__

        def call(pack: PackedConvolution, input: Tensor, other: Tensor | None = None, relu: bool = False) -> Tensor:
            self.made.append((pack._scale is not None, other is not None, relu))
            return own(pack, input, other, relu)

        monkeypatch.setattr(PackedConvolution, "__call__", call)


def residual() -> nn.Module:
    return nn.Sequential(resnet("resnet18").layer1[0], nn.Conv2d(64, 8, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pair", [ppm, head, pspnet, pspnet_concat, fused])
def test_modules_of_this_package(pair, dtype):
    model = settled(pair()[1]).to(dtype)
    ours = optimize(model, torch.randn(SIZES[0], dtype=dtype))
    for size in SIZES:
        v = torch.randn(size, dtype=dtype)
        for given in (v, v.contiguous(memory_format=torch.channels_last), v.mT.contiguous().mT, v[:0]):
            with torch.no_grad():
                assert_close(ours(given), model(given))


@pytest.mark.parametrize("name", MODELS)
def test_models_after_fuse(name):
    build, channels = MODELS[name]
    model = fuse(settled(build().double()))
    ours = optimize(model)
    for size in ((2, channels, 24, 16), (1, channels, 16, 24)):
        v = torch.randn(size, dtype=torch.float64)
        with torch.inference_mode():
            assert_close(ours(v), model(v))


def test_one_operator_for_each_convolution(monkeypatch):
    """Norm, sum and ReLU run with it: PSPNet of a ResNet has none of these beside."""
    model = settled(PSPNet(3, "resnet18", aux=False))
    ours, v = optimize(model), torch.randn(1, 3, 65, 57)
    calls = Calls(monkeypatch)
    with torch.no_grad():
        assert_close(ours(v)["out"], model(v)["out"])
    blocks, shortcuts, stem, dense, classifier = 8, 4, 3, 1, 1
    assert Counter(calls.made) == {
        (True, True, True): blocks,
        (True, False, True): blocks + stem,
        (True, False, False): shortcuts,
        (False, False, False): dense + classifier,
    }


class Aliases(nn.Module):
    """What writes to maps that wait, or that others hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.norm, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone()
        first = self.a(x)
        kept = first
        x.mul_(2)  # after the convolution of it
        second = self.b(x)
        both = self.norm(second), self.second(second)
        held = second
        second += first
        same = F.relu(second, inplace=True)
        total = first + self.b(same)
        total.relu_()
        third = self.norm(first)
        double = third + third
        first.add_(1.0)
        wide = self.a(x) + self.a(x)[:, :1]
        upsampled = F.interpolate(self.b(x), scale_factor=2.0, mode="bilinear")
        return first, kept, *both, held, second, same, total, third, double, wide, torch.relu(wide - third), upsampled


def test_aliases():
    model, v = settled(Aliases().double()), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        found, expected = optimize(model)(v), model(v)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Tensor
        assert_close(one, other)
    assert found[0] is found[1]


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_that_are_more_than_their_class(monkeypatch):
    """Hooks, parametrizations and subclasses act as in the model; a norm between is not passed over."""
    model = nn.Sequential(
        weight_norm(nn.Conv2d(8, 8, 3)),
        nn.BatchNorm2d(8),
        Doubled(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output.shape) or output + 1)
    model = settled(model)
    ours, v = optimize(model), torch.randn(2, 8, 7, 7)
    calls = Calls(monkeypatch)
    with torch.no_grad():
        assert_close(ours(v), model(v))
    assert len(seen) == 2
    assert len(calls.made) == 2  # not the one whose weight is computed


@pytest.mark.parametrize("build", [lambda: PSPNet(3, ToyBackbone()), residual])
def test_what_runs_plain(build):
    """Autocast, gradients, tensor subclasses, other transforms."""
    model = settled(build())
    v = torch.randn(2, 128 if build is residual else 3, 17, 13)
    ours = optimize(model, v)

    def output(m: nn.Module, x: Tensor) -> Tensor:
        result = m(x)
        return result["out"] if isinstance(result, dict) else result

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output(ours, v), output(model, v))
    grads = []
    for m in (ours, model):
        x = v.clone().requires_grad_()
        output(m, x).square().sum().backward()
        grads.append(x.grad)
    assert_close(*grads)
    assert all(p.grad is None for p in ours.parameters())
    with torch.no_grad():
        noted = output(ours, Noted.of(v, source="a file"))
        assert notes_of(noted) == {"source": "a file"}
        assert_close(torch.func.vmap(lambda x: output(ours, x[None]))(v)[:, 0], output(model, v))
        assert_close(output(torch.jit.trace(lambda x: output(ours, x), v), v), output(model, v))
    assert not output(ours, v).requires_grad


@pytest.mark.parametrize("kind", ["training", "evaluation", "optimized"])
def test_compiles_without_breaks(kind):
    """The whole PSPNet; tests/test_head.py and others have the parts, with gradients."""
    model, v = settled(PSPNet(3, ToyBackbone(), dropout=0.0)), torch.randn(2, 3, 33, 29)
    model.train(kind == "training")
    with torch.set_grad_enabled(kind == "training"):
        expected = copy.deepcopy(model)(v)["out"]
        ours = optimize(model) if kind == "optimized" else model
        assert_close(torch.compile(ours, backend="eager", fullgraph=True)(v)["out"], expected)


def test_the_model_stays_and_the_copy_is_frozen():
    model = settled(PSPNet(3, ToyBackbone(), aux=True)).train()
    model.layer3.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    ours, v = optimize(model, v := torch.randn(2, 3, 33, 33)), v
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        expected = ours(v)["out"]
        assert_close(expected, copy.deepcopy(model).eval()(v)["out"])
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1)
        assert torch.equal(ours(v)["out"], expected)
        assert (ours.align_corners, ours.classes) == (True, 3)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False), optimize(ours), ours.eval()):
            assert torch.equal(other(v)["out"], expected)
    for wrong in (ours.train, ours.double, ours.requires_grad_, lambda: ours.load_state_dict(before)):
        with pytest.raises(RuntimeError, match="optimized model cannot be"):
            wrong()
    with pytest.raises(AttributeError, match="nothing"):
        _ = ours.nothing


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, but is a function"):
        optimize(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be one of .*, but is torch.int8"):
        optimize(nn.Conv2d(1, 1, 1), dtype=torch.int8)
    with pytest.raises(RuntimeError, match="differs from the model"):
        optimize(nn.Sequential(nn.Conv2d(3, 3, 1), Noisy()), torch.randn(1, 3, 4, 4))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_bfloat16():
    """Its error is at most about that of the model in bfloat16, for norms are folded before rounding."""
    model = settled(PSPNet(3, ToyBackbone()))
    v = torch.randn(2, 3, 65, 57)
    ours = optimize(model, v, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = model.double()(v.double())["out"]
        found, rounded = ours(v)["out"], model.bfloat16()(v.bfloat16())["out"]
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 1.5 * (rounded - exact).abs().max()
    shifted = settled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    for tensor in (shifted[0].bias.data, shifted[1].running_mean):
        tensor += 100  # which bfloat16 has to 0.25
    with torch.no_grad():
        expected = shifted(v)
        assert_close(optimize(shifted, dtype=torch.bfloat16)(v).float(), expected, 0.01)


@pytest.mark.parametrize("onednn", [True, False])
def test_without_onednn(onednn, monkeypatch):
    """The plain convolutions give the same; where there is oneDNN it runs."""
    if not onednn:
        monkeypatch.setattr(packed, "has_onednn", lambda *_: False)
    model = settled(Bottleneck(8, 2, 1, 1, 1, nn.BatchNorm2d))
    ours, v = optimize(model), torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        assert_close(ours(v), model(v))
    used = [pack._reordered is not None for pack in ours._packs._packs.values()]
    assert used == [onednn and torch.backends.mkldnn.is_available()] * 3


# ---- Winograd's convolution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("size", [(9, 9), (11, 7), (1, 1), (2, 14), (31, 20)])
def test_winograd(size, dilation, monkeypatch):
    monkeypatch.setattr(winograd, "_CHUNK_ELEMENTS", 5000)  # in several pieces
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    found = winograd.convolve(x, winograd.transformed_weight(weight), dilation)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, F.conv2d(x, weight, padding=dilation, dilation=dilation))


def test_error_of_winograd():
    """In float32 within 1e-5 of the greatest result, with 512 channels."""
    x, weight = torch.randn(1, 512, 12, 12).relu(), torch.randn(8, 512, 3, 3)
    found = winograd.convolve(x, winograd.transformed_weight(weight), 1)
    assert_close(found.double(), F.conv2d(x.double(), weight.double(), padding=1), 5e-6)


def test_winograd_in_a_model(monkeypatch):
    """With norm, sum, bias and ReLU; where tiles do not fit, or the map is small, the plain convolution."""
    monkeypatch.setattr(packed, "_LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "_LEAST_PIXELS", 64)
    layers = nn.Conv2d(3, 8, 3, padding=2, dilation=2), FusedPPMHead(), nn.Conv2d(6, 6, 3, padding=1)
    model = settled(nn.Sequential(*layers, BasicBlock(6, 6, 1, 1, 2, nn.BatchNorm2d)))
    ours = optimize(model)
    runs = []
    own = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *args: runs.append(args[0].shape) or own(*args))
    for size, expected in (((2, 3, 18, 24), 5), ((1, 3, 5, 5), 0), ((0, 3, 18, 18), 0)):
        v = torch.randn(size)
        runs.clear()
        with torch.no_grad():
            assert_close(ours(v), model(v))
        assert len(runs) == expected


class FusedPPMHead(FusedPSPHead):
    """A head whose kind optimize knows only by its forward."""

    def __init__(self) -> None:
        super().__init__(FusedPPM(8, 2), nn.Conv2d(16, 6, 3, padding=1, bias=True), nn.BatchNorm2d(6), nn.ReLU())


def test_heads_are_frozen():
    """PSPNet's and FusedPSPHead; not with hooks, nor with more cells than few."""
    assert isinstance(optimize(settled(PSPNet(3, ToyBackbone()))).model.ppm, FrozenPSPHead)
    assert isinstance(optimize(settled(FusedPPMHead())).model, FrozenPSPHead)
    hooked = settled(FusedPPMHead())
    hooked.bottleneck[0].register_forward_hook(lambda *_: None)
    assert isinstance(optimize(hooked).model, FusedPSPHead)
    assert isinstance(optimize(settled(PSPNet(3, ToyBackbone(), bins=(16,)))).model.ppm, FusedPPM)


# ---- CUDA graphs, whose captures are replaced ------------------------------------------------------------------------


def test_graphs():
    """A shape's second call captures; only the first shapes that recur; what cannot be captured runs."""
    captured = []

    def capture(function, *tensors):
        if tensors[0].size(0) == 7:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.append(tensors[0].shape)
        return lambda *given: function(*given) + 100

    graphs = Graphs(lambda x: x + 1, capture)
    one, seven = torch.zeros(1), torch.zeros(7)
    assert [graphs(one).item() for _ in range(3)] == [1, 101, 101]
    assert [graphs(seven)[0].item() for _ in range(3)] == [1, 1, 1]
    assert graphs(one.double()).dtype == torch.float64
    for n in range(2, MOST + 4):
        graphs(torch.zeros(n)), graphs(torch.zeros(n))
    assert captured == [(1,), *((n,) for n in range(2, MOST))]
    results: list[float] = []
    threads = [threading.Thread(target=lambda: results.append(graphs(one).item())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [101] * 4
