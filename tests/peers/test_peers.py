"""fuse on the packages themselves, random weights: the same logits, gradients, keys, and back again."""

import copy
import importlib.util

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


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(x)
    output = output if isinstance(output, Tensor) else output.logits
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=output.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **{n: b.clone() for n, b in model.named_buffers()}, **gradients}


CASES = [(name, by_example) for name in packages.SMALL for by_example in (False, True)]
CASES += [(name, True) for name in packages.BY_EXAMPLE]


@pytest.mark.parametrize(("name", "by_example"), CASES)
def test_fuse(name, by_example, monkeypatch):
    monkeypatch.setattr(convolution, "LEAST_ELEMENTS", 0)  # these models are narrow
    build, size, scope, gains = (packages.SMALL | packages.BY_EXAMPLE)[name]
    torch.manual_seed(0)
    model = build().double()
    original, keys = copy.deepcopy(model), list(model.state_dict())
    parameters = list(model.parameters())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    if by_example:
        _, report = fuse(model, example=x, return_report=True)
        found = {c.module: c for c in report.convolutions}
        assert gains in found
        assert found[gains].scope == scope
        assert found[gains].saved > 0.1
    else:
        fuse(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    calls = []
    pyramid_context_ = ops.pyramid_context_
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: calls.append(1) or pyramid_context_(*a, **k))
    for training in (True, False):
        ours, expected = run(model.train(training), x), run(original.train(training), x)
        assert ours.keys() == expected.keys()
        for key, truth in expected.items():
            # a gradient that is 0 but for rounding (a bias before a norm) is measured against 1
            error = (ours[key] - truth).double().norm() / truth.double().norm().clamp_min(1)
            assert error <= 1e-10, (key, error)
    assert calls
    assert not any(isinstance(m, Fused) for m in unfuse(model).modules())
    unfuse(model).load_state_dict(original.state_dict())
    assert torch.equal(run(model, x)["output"], run(original, x)["output"])
