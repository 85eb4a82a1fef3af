"""fuse on models built as other packages build them: the same numbers, parameters and keys as before."""

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from foreign import MODELS, PPM, ConvModule, PSPDecoder, PSPHead, Semseg
from stock import StockPPM
from torch import Tensor, nn

from pspnet_fast import FusedPPM, PyramidSettings, fuse, head, unfuse
from pspnet_fast.fusion.patch import Fused


@pytest.fixture(autouse=True)
def small_maps_as_large_ones(monkeypatch):
    """The heads run without the concatenation at the sizes of these tests too."""
    monkeypatch.setattr(head, "concatenation_is_cheaper", lambda *_: False)


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A model with norms that are not the identity, and an input."""
    build, channels = MODELS[name]
    model = build().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.uniform_(0.5, 1.5)
    return model, torch.randn(3, channels, 13, 9, dtype=dtype)


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients, buffers; dropout draws the same in every run."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(x)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=output.dtype))
    parts = {"output": output.detach(), "input": x.grad, **{n: b.clone() for n, b in model.named_buffers()}}
    return parts | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == expected.keys()
    for name, truth in expected.items():
        scale = tolerance * truth.abs().max().clamp_min(1).item()
        torch.testing.assert_close(ours[name], truth, rtol=0, atol=scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_all_gradients(name, training):
    model, x = make(name)
    fused = fuse(copy.deepcopy(model))
    assert any(isinstance(m, Fused) for m in fused.modules())
    model.train(training), fused.train(training)
    assert_same(run(fused, x), run(model, x))
    if not training:
        with torch.no_grad():  # norms folded
            torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_every_pyramid_and_its_bottleneck_are_fused(name):
    model, _ = make(name)
    _, report = fuse(model, return_report=True)
    (replaced,), kept = report.replaced, report.kept
    assert replaced.bottleneck is not None
    assert not kept
    assert [b if isinstance(b, int) else b[0] for b in replaced.bins] == [1, 2, 3, 6]
    assert replaced.align_corners == (name not in ("mmseg PSPHead", "mmseg UPerHead", "smp UPerNet"))
    assert replaced.concat == ("input_last" if name == "smp PSPNet" else "input_first")


@pytest.mark.parametrize("name", MODELS)
def test_heads_run_without_concatenation_module(name, monkeypatch):
    """The fused head takes the map itself: no module of the model is given the concatenation."""
    model, x = make(name)
    fuse(model)
    seen = []
    forward = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda s, i, *a: seen.append(i.size(1)) or forward(s, i, *a))
    model.eval()(x)
    assert {"semseg": 16, "smp PSPNet": 16, "Encoding": 16}.get(name, 32) not in seen


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_and_keys(name):
    model, x = make(name)
    parameters, names = list(model.parameters()), [n for n, _ in model.named_modules()]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reference = copy.deepcopy(model)
    other = torch.optim.SGD(reference.parameters(), 0.1)
    assert fuse(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [n for n, _ in model.named_modules()] == names
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    for m, o in ((model, optimizer), (reference, other)):
        for _ in range(2):
            run(m, x)
            o.step()
    assert not torch.equal(next(model.parameters()), before[next(iter(before))])
    assert_same(dict(model.state_dict()), dict(reference.state_dict()), 1e-8)
    model.load_state_dict(before)  # an old checkpoint
    reference.load_state_dict(before)
    assert_same(run(model, x), run(reference, x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("used_before", [False, True])
def test_copies_and_pickles(name, used_before):
    model, x = make(name)
    expected = run(copy.deepcopy(model).eval(), x)
    fuse(model).eval()
    if used_before:
        model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert {type(m) for m in other.modules()} == {type(m) for m in model.modules()}
        assert all(a is not b for a, b in zip(other.parameters(), model.parameters(), strict=True))
        assert_same(run(other, x), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert_same(run(model, x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_restores_the_original(name):
    model, x = make(name)
    attributes = [(type(m), set(m.__dict__)) for m in model.modules()]
    expected = run(copy.deepcopy(model), x)
    fuse(model)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] != attributes
    assert unfuse(model) is model
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == attributes
    assert all(torch.equal(a, b) for a, b in zip(run(model, x).values(), expected.values(), strict=True))
    unfuse(model)
    fuse(model)  # and again


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(name, training):
    torch.compiler.reset()
    model, x = make(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0  # drawn by the compiler in another order
    fuse(model).train(training)
    expected = run(copy.deepcopy(model), x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    ours = run(compiled, x)
    assert_same({key.removeprefix("_orig_mod."): value for key, value in ours.items()}, expected)


def test_conversions_after_fuse():
    """What exchanges modules or casts parameters later is seen by the fused forward."""
    model, x = make("semseg")
    fuse(model).eval()(x)
    model.float()
    assert model(x.float()).dtype == torch.float32
    nn.SyncBatchNorm.convert_sync_batchnorm(model).double().train()
    model(x.double())
    assert int(model.ppm.features[1][2].num_batches_tracked) == 1
    model.cls[4] = nn.Conv2d(6, 5, 1).double()
    model.ppm.features[0][1] = nn.Conv2d(8, 2, 1, bias=False).double()
    model.eval()
    expected = unfuse(copy.deepcopy(model))
    assert model(x.double()).shape[1] == 5
    torch.testing.assert_close(model(x.double()), expected(x.double()), rtol=1e-10, atol=1e-10)


def test_report_and_log(caplog):
    model = nn.ModuleDict({"a": Semseg(), "b": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(1))})
    with caplog.at_level(logging.INFO, logger="pspnet_fast"):
        same, report = fuse(model, return_report=True)
    assert same is model
    assert [(r.pyramid, r.bottleneck) for r in report.replaced] == [("a.ppm", "a.cls")]
    assert [k.module for k in report.kept] == ["b"]
    assert "0 convolutions" in report.kept[0].reason
    assert caplog.messages == str(report).splitlines()
    assert caplog.messages[0] == "fused 'a.ppm' with 'a.cls': bins (1, 2, 3, 6), align_corners=True, input_first"


def test_nothing_to_fuse_is_an_error():
    with pytest.raises(ValueError, match="nothing to fuse: looked for modules of AdaptiveAvgPool2d to several sizes"):
        fuse(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1)))
    model = fuse(Semseg())
    with pytest.raises(ValueError, match="kept 'ppm': it is fused already"):
        fuse(model)


class Odd(PPM):
    """A pyramid but for one thing in its forward."""

    def __init__(self, change: str) -> None:
        super().__init__(8, 2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        mode = {"mode": "nearest"} if self.change == "nearest" else {"mode": "bilinear", "align_corners": True}
        levels = [F.interpolate(f(x), x.shape[2:], **mode) for f in self.features]
        if self.change == "dropout":
            levels[0] = F.dropout(levels[0], training=self.training)
        if self.change == "reversed":
            levels = levels[::-1]
        if self.change == "raises":
            raise NotImplementedError("needs something")
        return torch.cat([x, *levels], 1) if self.change != "scaled" else torch.cat([x, *levels], 1) * 2


@pytest.mark.parametrize("change", ["nearest", "dropout", "reversed", "scaled"])
def test_what_computes_otherwise_stays(change):
    with pytest.raises(ValueError, match=r"kept '0': its forward is not that of a pyramid"):
        fuse(nn.Sequential(Odd(change), nn.Conv2d(16, 3, 1)))


def test_settings_of_what_cannot_be_tried():
    model = nn.Sequential(Odd("raises"), nn.Conv2d(16, 3, 3, padding=1)).double().eval()
    with pytest.raises(ValueError, match=r"kept '0': on one map \(N, 8, H, W\) it raises NotImplementedError"):
        fuse(model)
    expected = nn.Sequential(copy.deepcopy(model[0]), model[1])
    expected[0].change = ""
    fuse(model, modules={"0": PyramidSettings(align_corners=True, concat="input_first", output="concat")})
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-10, atol=1e-10)


def test_named_module_without_pooling_layers():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            levels = [c(F.adaptive_avg_pool2d(x, b)) for c, b in zip(self.convs, (2, 5), strict=True)]
            return torch.cat([F.interpolate(z, x.shape[2:], mode="bilinear") for z in levels] + [x], 1)

    model = nn.Sequential(Functional(), nn.Conv2d(16, 3, 1)).double()
    with pytest.raises(ValueError, match="nothing to fuse"):
        fuse(model)
    reference = copy.deepcopy(model)
    _, report = fuse(model, modules={"0": PyramidSettings(bins=(2, 5))}, return_report=True)
    assert (report.replaced[0].concat, report.replaced[0].align_corners) == ("input_last", False)
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    assert_same(run(model, x), run(reference, x))


def test_names():
    model = nn.ModuleDict({"a": Semseg(), "b": Semseg()})
    _, report = fuse(model, modules=["b.ppm"], return_report=True)
    assert [r.pyramid for r in report.replaced] == ["b.ppm"]
    with pytest.raises(ValueError, match=r"modules must be names in model.named_modules\(\), which has no \['c'\]"):
        fuse(model, modules=["c"])
    with pytest.raises(ValueError, match=r"kept 'a.cls': "):
        fuse(model, modules=["a.ppm", "a.cls"])
    assert not any(isinstance(m, Fused) for m in model["a"].modules())
    with pytest.raises(TypeError, match="modules must be several names or a mapping"):
        fuse(model, modules="a.ppm")


def test_pyramid_alone():
    for build in (Semseg, PSPDecoder):
        model = build().double()
        reference = copy.deepcopy(model)
        _, report = fuse(model, heads=False, return_report=True)
        assert report.replaced[0].bottleneck is None
        x = torch.randn(2, 3 if build is Semseg else 8, 13, 9, dtype=torch.float64)
        assert_same(run(model, x), run(reference, x))
    with pytest.raises(ValueError, match="list of maps, which only a bottleneck can be fused with"):
        fuse(PSPHead(), heads=False)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(16, 3, 3),  # unpadded
        nn.Conv2d(16, 3, 2),
        nn.Conv2d(16, 3, 3, padding=1, stride=2),
        nn.Conv2d(16, 4, 3, padding=1, groups=2),
        nn.Conv2d(16, 3, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_other_convolutions_are_no_bottleneck(convolution):
    model = nn.Sequential(PPM(8, 2), convolution).double()
    reference = copy.deepcopy(model)
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck is None
    assert "1: conv must be " in report.replaced[0].note or "1: conv must have an odd kernel" in report.replaced[0].note
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    assert_same(run(model, x), run(reference, x))


@pytest.mark.parametrize("dilation", [1, 2])
def test_dilated_bottleneck(dilation):
    model = nn.Sequential(PPM(8, 2), ConvModule(16, 5, 3, dilation)).double()
    reference = copy.deepcopy(model)
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck == "1"
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    assert_same(run(model, x), run(reference, x))


def test_bottleneck_with_another_order_stays():
    class Reordered(ConvModule):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.activate(self.conv(x)))

    _, report = fuse(nn.Sequential(PPM(8, 2), Reordered(16, 5, 3)), return_report=True)
    assert report.replaced[0].bottleneck is None
    assert "1: it does not run its layers one after another" in report.replaced[0].note


def test_modules_with_hooks_stay():
    model = Semseg()
    model.ppm.features[0][2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="BatchNorm2d inside has hooks, which would no longer run"):
        fuse(model)
    model = Semseg()
    model.cls[0].register_forward_hook(lambda *_: None)
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck is None
    assert "cls: Conv2d inside has hooks" in report.replaced[0].note


def test_two_possible_bottlenecks_are_none():
    model = nn.ModuleDict({"ppm": PPM(8, 2), "one": nn.Conv2d(16, 3, 1), "two": nn.Conv2d(16, 3, 1)})
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck is None
    assert "2 modules beside it take its 16 channels" in report.replaced[0].note


class Elsewhere(Semseg):
    def forward(self, image: Tensor) -> Tensor:
        x = self.ppm(self.layer4(self.layer3(image)))
        return self.cls(self.change(x))


@pytest.mark.parametrize(
    "change", [lambda x: F.relu(x), lambda x: x.relu(), lambda x: torch.cat([x, x], 1), lambda x: x[:, :8]]
)
def test_other_use_of_the_concatenation_raises(change):
    """Never a silently different result."""
    model = Elsewhere()
    model.change = change
    fuse(model)
    with pytest.raises((RuntimeError, TypeError)):
        model(torch.randn(2, 3, 20, 20))
    with pytest.raises(RuntimeError, match="used otherwise than by the fused bottleneck beside it"):
        F.relu(model.ppm(torch.randn(2, 8, 9, 9)))


def test_bottleneck_still_takes_a_concatenation():
    model = Semseg().double().eval()
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    expected = model.cls(x)
    assert torch.equal(fuse(model).cls(x), expected)


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    model = Semseg()
    torch.set_rng_state(before)
    fuse(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = Semseg()
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck == "cls"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_branches_with_biases_and_mixed_norms(training, dtype):
    """Bias before a norm (as PaddleSeg has it), bias alone, and float32 norms beside other weights."""
    convolutions = [nn.Conv2d(8, 2, 1) for _ in range(3)]
    norms = [nn.BatchNorm2d(2), nn.Identity(), nn.BatchNorm2d(2, eps=0.1)]
    branches = list(zip(convolutions, norms, [nn.ReLU(), nn.ReLU(), nn.ReLU()], strict=True))
    ppm = FusedPPM.from_branches(branches, (1, 2, 3)).to(dtype).train(training)
    if dtype == torch.bfloat16:
        norms[0].float(), norms[2].float()
    assert ppm.features[0][1] is convolutions[0]
    for norm in (norms[0], norms[2]):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.uniform_(0.5, 1.5)
    x = torch.randn(2, 8, 13, 9, dtype=dtype)
    exact = StockPPM(ppm).double().train(training)
    truth, tolerance = run(exact, x.double())["output"], 1e-10 if dtype == torch.float64 else 0.02
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(ppm)(x).double(), truth, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        stock = StockPPM(ppm).train(training)
        assert_same(run(ppm, x), run(stock, x))


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([nn.Conv2d(8, 2, 3)] * 2, "branches must be 1x1 convolutions of the same channels"),
        ([nn.Conv2d(8, 2, 1), nn.Conv2d(8, 3, 1)], "branches must be 1x1 convolutions of the same channels"),
        ([nn.Conv2d(8, 2, 1)], r"branches must hold one a level, 2 for bins \(1, 2\), but hold 1"),
    ],
)
def test_bad_branches(branches, message):
    with pytest.raises(ValueError, match=message):
        FusedPPM.from_branches([(c, nn.Identity(), nn.Identity()) for c in branches], (1, 2))
