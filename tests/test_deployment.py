"""What records a module, compiles it ahead of time, or hands it tensors of its own kind."""

import copy
import io

import pytest
import torch
from foreign import MODELS, assert_same
from metadata_tensor import Noted, notes_of
from pairs import fused, head, ppm, pspnet, pspnet_concat, x
from stock_head import StockHead, make_head
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

from pspnet_fast import fuse
from pspnet_fast.bench.stock import StockPPM

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones", "one_thread")
PAIRS = [ppm, head, pspnet, pspnet_concat, fused]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_traces(pair, grad):
    """torch.jit.trace, checked by itself, saved and loaded, for other sizes."""
    stock, ours = (model.double().eval() for model in pair())
    file = io.BytesIO()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(ours, x())
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for v in (x(), torch.randn(2, 8, 21, 10, dtype=torch.float64)):
        torch.testing.assert_close(loaded(v), stock(v), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_symbolic_traces(pair, training):
    stock, ours = (model.double().train(training) for model in pair())
    graph = torch.fx.symbolic_trace(ours)
    for v in (x(), torch.randn(2, 8, 21, 10, dtype=torch.float64)):
        torch.testing.assert_close(graph(v), stock(v), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_traces_of_fused_models(name):
    build, channels = MODELS[name]
    stock = build().double().eval()
    v = torch.randn(2, channels, 24, 16, dtype=torch.float64)
    graph = torch.fx.symbolic_trace(fuse(copy.deepcopy(stock)))
    torch.testing.assert_close(graph(v), stock(v), rtol=1e-10, atol=1e-10)


def test_quantisation_by_graphs():
    """quantize_fx, which begins with a symbolic trace."""
    v, results = x().float(), []
    module = make_head()
    for model in (nn.Sequential(StockPPM(module.ppm), copy.deepcopy(module.bottleneck)).eval(), module.eval()):
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (v,))
        prepared(v)
        results.append(quantize_fx.convert_fx(prepared)(v))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_tensor_subclasses(pair, training):
    """They go in, come out with their notes, and gradients are the same."""
    results = []
    for model in pair():
        model.double().train(training)
        v = Noted.of(x().requires_grad_(), source="a file")
        output = model(v)
        assert notes_of(output) == {"source": "a file"}
        output.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        parts = {"output": output.detach(), **gradients, **dict(model.named_buffers())}
        results.append({n: t.as_subclass(torch.Tensor) for n, t in parts.items()})
        with torch.no_grad():
            assert notes_of(model(v)) == {"source": "a file"}
    assert_same(results[1], results[0])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda n: nn.GroupNorm(1, n)])
def test_exported_with_gradients(norm):
    """No list of tensors is empty, which AOTInductor's runner takes for None; values and gradients for any size.

    tests/peers/test_aotinductor.py compiles and runs such a program.
    """
    module = make_head(norm=norm, bias=True).eval()
    stock = StockHead(module).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (x().float(),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    nodes = [node for node in program.graph.nodes if "pspnet_fast" in str(node.target)]
    assert len(nodes) == 3
    assert all(a for node in nodes for a in node.args if isinstance(a, (list, tuple)))
    exported, v = program.module(), torch.randn(2, 8, 12, 20)
    output, expected = exported(v), stock(v)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(expected)
    output.backward(grad), expected.backward(grad)
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (exported, stock)]
    assert_same(gradients[0], gradients[1], 1e-4)
