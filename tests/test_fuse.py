"""fuse on models built as other packages build them: the same numbers, parameters and keys as before."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from foreign import MODELS, PPM, ConvModule, PSPDecoder, PSPHead, Semseg, assert_same, run
from stock import StockPPM
from torch import Tensor, nn

from pspnet_fast import FusedPPM, fuse, unfuse
from pspnet_fast.fusion.patch import Fused

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")


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


@pytest.mark.parametrize("dilation", [1, 2])
def test_dilated_bottleneck(dilation):
    model = nn.Sequential(PPM(8, 2), ConvModule(16, 5, 3, dilation)).double()
    reference = copy.deepcopy(model)
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck == "1"
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    assert_same(run(model, x), run(reference, x))


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
