"""fuse on models built as other packages build them: the same numbers, parameters and keys as before."""

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from foreign import MODELS, Semseg, assert_same, run
from torch import Tensor, nn

from pspnet_fast import FusedPPM, fuse, ops, unfuse
from pspnet_fast.bench.stock import StockPPM
from pspnet_fast.fusion import Fused
from pspnet_fast.fusion.lazy import Concat

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")


HALVED = ("semseg", "mmseg UPerHead")


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A model with norms that are not the identity, and an input."""
    build, channels = MODELS[name]
    model = build().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.uniform_(0.5, 1.5)
    halved = name in HALVED  # before the pyramid
    return model, torch.randn(3, channels, *((26, 18) if halved else (13, 9)), dtype=dtype)


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
def test_the_bottleneck_runs_without_the_concatenation(name, monkeypatch):
    model, x = make(name)
    fuse(model).eval()
    inputs, taken = [], []
    real, low = F.conv2d, ops.pyramid_context_
    monkeypatch.setattr(F, "conv2d", lambda x, *a, **k: inputs.append(type(x)) or real(x, *a, **k))
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: taken.append(a[2]) or low(*a, **k))
    model(x)
    assert taken == [[(1, 1), (2, 2), (3, 3), (6, 6)]]
    assert inputs.count(Concat) == 1  # what the model's own convolution was called with


@pytest.mark.parametrize("name", MODELS)
def test_what_an_example_shows(name):
    model, x = make(name)
    mode = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    _, report = fuse(model, example=x, return_report=True)
    (found,) = report.convolutions
    assert report.fused == (found.scope,)
    assert isinstance(model.get_submodule(found.scope), Fused)
    assert isinstance(model.get_submodule(found.module), nn.Conv2d)
    assert found.of == model.get_submodule(found.module).in_channels
    assert found.channels == found.of - 8
    cells, pixels = 50, 13 * 9
    assert found.saved == pytest.approx((found.channels - found.channels / 4 * cells / pixels) / found.of)
    assert [m.training for m in model.modules()] == mode
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert fuse(model, example=x, return_report=True)[1] == report  # of a model that is fused


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


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    model = Semseg()
    torch.set_rng_state(before)
    fuse(model, example=torch.randn(1, 3, 40, 40, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_report_and_log(caplog):
    model = nn.ModuleDict({"a": Semseg(), "b": nn.Sequential(nn.AdaptiveAvgPool2d(1))})
    with caplog.at_level(logging.INFO, logger="pspnet_fast"):
        same, report = fuse(model, return_report=True)
    assert same is model
    assert (report.fused, report.chosen_for, report.convolutions) == (("a",), ("a.ppm",), ())
    assert caplog.messages == [str(report)] == ["fused 'a'\nchosen for 'a.ppm'"]
    assert fuse(model, return_report=True)[1] == report  # once more changes nothing
    _, report = fuse(Semseg(), example=torch.randn(1, 3, 40, 40), return_report=True)
    assert str(report).splitlines()[1].startswith("'cls.0', in '': 8 of 16 input channels convolved before")


def test_names():
    model = nn.ModuleDict({"a": Semseg(), "b": Semseg()})
    _, report = fuse(model, modules=["b"], return_report=True)
    assert report.fused == ("b",)
    assert not any(isinstance(m, Fused) for m in model["a"].modules())
    with pytest.raises(ValueError, match=r"modules must be names in model.named_modules\(\), which has no \['c'\]"):
        fuse(model, modules=["a", "c"])
    assert not any(isinstance(m, Fused) for m in model["a"].modules())
    with pytest.raises(TypeError, match="modules must be several names"):
        fuse(model, modules="a")


def test_nothing_to_fuse_is_an_error():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match=r"nothing to fuse: no module of the model has layers nn\.AdaptiveAvgPool2d"):
        fuse(model)
    with pytest.raises(ValueError, match="nothing to fuse: the forward on the example convolves no upsampled map"):
        fuse(model, example=torch.randn(1, 3, 9, 9))
    assert not any(isinstance(m, Fused) for m in model.modules())


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = Semseg()
    _, report = fuse(model, return_report=True)
    assert report.fused == ("",)
    weights, x = Semseg(), torch.randn(1, 3, 40, 40)
    model.to_empty(device="cpu").load_state_dict(weights.state_dict())
    torch.testing.assert_close(model.eval()(x), weights.eval()(x))


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
