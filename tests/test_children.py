"""A layer that is more than its class computes is called: whatever people do to the layers inside a head counts.

Each is done to the module and to the same of plain torch layers. Two steps of training, evaluation, evaluation after
other weights are loaded: outputs, all gradients and all buffers must be the same, those of spectral norm included,
which are others if a weight is read more often than once a forward.
"""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from children import ANY, CONVOLUTION, NORM, Change
from foreign import assert_same, run
from pairs import Pair, fused, head, ppm, pspnet, x
from torch import Tensor, nn
from torch.ao import quantization
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

from pspnet_fast import FusedPPM

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones", "one_thread")


CASES: list[tuple[Callable[[], Pair], str, dict[str, Change]]] = [
    (ppm, "features.1.1", CONVOLUTION),
    (ppm, "features.1.2", NORM | ANY),
    *((ppm, name, ANY) for name in ("features.1", "features.1.0", "features.1.1", "features.1.3")),
    (head, "bottleneck.0", CONVOLUTION),
    (head, "bottleneck.1", NORM),
    *((head, name, ANY) for name in ("ppm", "bottleneck", "bottleneck.0", "bottleneck.2")),
    (pspnet, "model.cls", ANY),
    (pspnet, "model.cls.0", {name: CONVOLUTION[name] for name in ("LoRA", "pruned", "spectral_norm")}),
    (fused, "cls.0", CONVOLUTION),
    (fused, "ppm.features.1.1", CONVOLUTION),
]


@pytest.mark.parametrize(
    ("pair", "layer", "change"),
    [
        pytest.param(pair, layer, change, id=f"{pair.__name__}-{layer}-{name}")
        for pair, layer, changes in CASES
        for name, change in changes.items()
    ],
)
def test_whatever_is_done_to_a_layer_counts(pair, layer, change):
    stock, ours = (model.double() for model in pair())
    untouched = copy.deepcopy(stock)
    for model in (stock, ours):
        torch.manual_seed(1)
        change(model, layer)
    for step, training in enumerate((True, True, False)):
        results = [run(model.train(training), x()) for model in (stock, ours)]
        assert step or _differ(results[0], run(untouched, x()))
        assert_same(results[1], results[0])
        for model in (stock, ours):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=0.01)
    for model in (stock, ours):
        state = model.state_dict()
        model.load_state_dict({key: v * 1.1 if v.is_floating_point() else v for key, v in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(ours(x()), stock(x()), rtol=1e-10, atol=1e-10)


def _differ(changed: dict[str, Tensor], untouched: dict[str, Tensor]) -> bool:
    """Whether a change shows: in outputs, gradients, buffers or names."""
    return changed.keys() != untouched.keys() or any(not torch.equal(changed[n], t) for n, t in untouched.items())


@pytest.mark.parametrize("pair", [ppm, head, pspnet, fused])
def test_global_hooks_see_every_layer(pair):
    """As profilers and summaries register them."""
    seen: list[list[str]] = []
    for model in pair():
        names, calls = {module: name for name, module in model.named_modules()}, []
        hooks = (
            register_module_forward_hook(lambda m, i, o, names=names, calls=calls: calls.append(names[m])),
            register_module_full_backward_hook(lambda m, i, o, names=names, calls=calls: calls.append(names[m])),
        )
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # which torch refuses to run on a result of a backward hook
        try:
            model(x(dtype=torch.float32)).sum().backward()
        finally:
            for hook in hooks:
                hook.remove()
        seen.append(sorted(calls))
    assert len(seen[0]) > 30
    assert seen[1] == seen[0]


@pytest.mark.parametrize("pair", [ppm, head, fused])
def test_observers_of_eager_quantisation_run(pair):
    ranges = []
    for model in pair():
        model.eval().qconfig = quantization.default_qconfig
        quantization.prepare(model, inplace=True)
        model(x(dtype=torch.float32))
        observers = {n: m for n, m in model.named_modules() if isinstance(m, quantization.MinMaxObserver)}
        ranges.append({f"{n} {i}": v for n, m in observers.items() for i, v in enumerate((m.min_val, m.max_val))})
    assert len(ranges[0]) >= 2 * 8
    assert_same(ranges[1], ranges[0], 1e-5)


@pytest.mark.parametrize("pair", [ppm, head, pspnet, fused])
def test_sharded_parts(pair, process_group):
    """fully_shard of the pyramid and of what follows it, each for itself."""
    stock, ours = pair()
    sharded = copy.deepcopy(ours)
    parts = {n: m for n, m in sharded.named_modules() if n.split(".")[-1] in ("ppm", "bottleneck", "cls")}
    for module in parts.values() if parts else sharded.features:
        fully_shard(module, mesh=process_group)
    for training in (True, False):
        expected = run(stock.train(training), x(dtype=torch.float32))
        results = run(sharded.train(training), x(dtype=torch.float32))
        assert_same(
            {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in results.items()}, expected, 1e-4
        )


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", [None, *NORM.values(), ANY["forward hook"]])
@pytest.mark.parametrize("layer", ["features.0.2", "features.0"])
def test_one_value_a_channel(layer, change):
    """Running statistics where batch statistics do not exist, of whatever the norm is, and it stays in training."""
    stock, ours = (model.double() for model in ppm())
    for model in (stock, ours):
        if change and not (layer == "features.0" and change in NORM.values()):
            change(model, layer)
    stock.train().features[0].eval()
    results = [run(model, x(1)) for model in (stock, ours.train())]
    assert_same(results[1], results[0])
    assert ours.features[0][2].training


@pytest.mark.parametrize("activation", [nn.Identity, nn.SiLU])
@pytest.mark.parametrize("pair", [ppm, head, fused])
def test_batch_norms_get_gradients_of_a_layout_that_torch_takes(pair, activation):
    """At batch 1 torch's batch norm (2.13) takes some strides of a view for others: see FusedPPM._each_level."""
    stock, ours = (model.double().eval() for model in pair())
    for model in (stock, ours):
        levels = model.get_submodule("features" if pair is ppm else "ppm.features")
        levels[1].register_forward_hook(lambda *_: None)
        for level in levels:
            level[3] = activation()
    assert_same(run(ours, x(1)), run(stock, x(1)))


def test_replicas_of_data_parallel():
    """Their weights are tensors of the graph, and no module counts them among its parameters."""
    stock, ours = (model.double().eval() for model in head())
    replica = _replica(ours)
    assert not list(replica.parameters())
    replica(x()).square().sum().backward()
    stock(x()).square().sum().backward()
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in (stock, ours)]
    assert_same(gradients[1], gradients[0])


def _replica(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes it."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = _replica(child)
    for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
        replica._buffers.pop(name, None)
        setattr(replica, name, None if tensor is None else tensor.clone())
    return replica


def test_a_level_of_other_channels_is_refused():
    module = FusedPPM(8)
    module.features[1][1] = nn.Conv2d(8, 3, 1)
    module.features[1][2] = nn.Identity()
    with pytest.raises(ValueError, match=r"features\[1\] must give a map of shape \(2, 2, 2, 2\), but gives \(2, 3, 2"):
        module(torch.randn(2, 8, 6, 6))
    module.features[1][1] = nn.Conv2d(8, 2, 1, stride=2)
    with pytest.raises(ValueError, match=r"features\[1\] must give a map of shape \(2, 2, 2, 2\), but gives \(2, 2, 1"):
        module(torch.randn(2, 8, 6, 6))
