"""fuse on the packages themselves, random weights: the same logits, gradients, keys, and back again."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspnet_fast import fuse, ops, unfuse
from pspnet_fast.fusion import Fused, convolution

PACKAGES = ("torchvision", "segmentation_models_pytorch", "timm", "transformers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed: make test-peers", allow_module_level=True)

import packages  # noqa: E402


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for key, truth in expected.items():
        # a gradient that is 0 but for rounding (a bias before a norm) is measured against 1
        error = (ours[key] - truth).double().norm() / truth.double().norm().clamp_min(1)
        assert error <= 1e-10, (key, error)


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = logits_of(model(x))
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=output.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **{n: b.clone() for n, b in model.named_buffers()}, **gradients}


@pytest.mark.parametrize("name", [*packages.SMALL, *packages.BY_EXAMPLE])
def test_fuse(name, monkeypatch):
    monkeypatch.setattr(convolution, "LEAST_ELEMENTS", 0)  # these models are narrow
    build, size, scope, gains = (packages.SMALL | packages.BY_EXAMPLE)[name]
    torch.manual_seed(0)
    model = build().double()
    original, keys = copy.deepcopy(model), list(model.state_dict())
    parameters = list(model.parameters())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    _, report = fuse(model, example=x, return_report=True)
    found = {c.module: c for c in report.convolutions}
    assert gains in found
    assert found[gains].scope == scope
    assert found[gains].saved > 0.1
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    calls = []
    pyramid_context_ = ops.pyramid_context_
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: calls.append(1) or pyramid_context_(*a, **k))
    for training in (True, False):
        assert_same(run(model.train(training), x), run(original.train(training), x))
    assert calls
    if name in packages.SMALL:  # found without an example
        calls.clear()
        with torch.no_grad():
            ours, expected = (logits_of(m(x)) for m in (fuse(copy.deepcopy(original)), original))
        assert_same({"output": ours}, {"output": expected})
        assert calls
    assert not any(isinstance(m, Fused) for m in unfuse(model).modules())
    unfuse(model).load_state_dict(original.state_dict())
    assert torch.equal(run(model, x)["output"], run(original, x)["output"])
