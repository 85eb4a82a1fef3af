"""FusedPSPHead computes with what its layers are and hold at the time of the call."""

import copy

import pytest
import torch
from stock_head import StockHead, make_head
from torch import nn

from pspnet_fast import FusedPSPHead, head


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """These maps would be too small for the fused form."""
    monkeypatch.setattr(head, "concatenation_is_cheaper", lambda *_: False)


def step_of(make_optimizer):
    def change(module: FusedPSPHead) -> None:
        optimizer = make_optimizer(module.parameters())
        module(X).square().mean().backward()
        optimizer.step()

    return change


def assign(module: FusedPSPHead) -> None:
    module.bottleneck[0].weight = nn.Parameter(torch.randn_like(module.bottleneck[0].weight))


def average(module: FusedPSPHead) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(0.5).add_(torch.randn_like(parameter.data), alpha=0.5)


X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))
CHANGES = {
    "fused AdamW": step_of(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "fused SGD": step_of(lambda p: torch.optim.SGD(p, 1.0, fused=True)),
    "fused Adagrad": step_of(lambda p: torch.optim.Adagrad(p, 0.1, fused=True)),
    "SGD": step_of(lambda p: torch.optim.SGD(p, 1.0)),
    "mean teacher": average,
    "data": lambda m: setattr(m.bottleneck[0].weight, "data", torch.randn_like(m.bottleneck[0].weight)),
    "slice of data": lambda m: m.bottleneck[0].weight.data[:, 3:5].zero_(),
    "numpy": lambda m: m.bottleneck[0].weight.detach().numpy().fill(0.5),
    "assignment": assign,
    "load": lambda m: m.load_state_dict({key: value + 1 for key, value in m.state_dict().items()}),
    "foreach": lambda m: torch._foreach_mul_([p.data for p in m.parameters()], 2.0),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_is_of_the_weights_as_they_are_now(change, channels_last):
    """In evaluation mode throughout: nothing tells the module that its parameters were written to."""
    module = make_head().eval()
    if channels_last:
        module.to(memory_format=torch.channels_last)
    with torch.no_grad():
        module(X)
        before = module(X)
    CHANGES[change](module)
    with torch.no_grad():
        after, expected = module(X), StockHead(copy.deepcopy(module)).eval()(X)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, expected)
