"""FusedPSPHead computes with what its layers are and hold at the time of the call."""

import copy

import pytest
import torch
from stock import StockPPM
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


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class NormReLU(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Adapted(nn.Module):
    """As LoRA puts it in place of a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.low = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.low(x)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight


def standardise(conv: nn.Conv2d) -> nn.Conv2d:
    other = Standardised(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, bias=False)
    other.load_state_dict({"weight": conv.weight})
    return other


def norm_relu(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    other = NormReLU(norm.num_features)
    other.load_state_dict(norm.state_dict())
    other.bias.data.sub_(1)
    return other


def exchange(sequence: nn.Sequential, index: int, make) -> None:
    sequence[index] = make(sequence[index])


def forward_of_its_own(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: forward(x) * 2
    return module


SPECIAL = {
    "standardised convolution": lambda h: exchange(h.bottleneck, 0, standardise),
    "adapted convolution": lambda h: exchange(h.bottleneck, 0, Adapted),
    "norm of its own": lambda h: exchange(h.bottleneck, 1, norm_relu),
    "forward on the instance": lambda h: exchange(h.bottleneck, 0, forward_of_its_own),
    "hook on the convolution": lambda h: h.bottleneck[0].register_forward_hook(lambda m, i, o: o * 2),
    "hook on the norm": lambda h: h.bottleneck[1].register_forward_hook(lambda m, i, o: o * 2),
    "hook on the activation": lambda h: h.bottleneck[2].register_forward_hook(lambda m, i, o: o + 1),
    "spectral norm by a hook": lambda h: nn.utils.spectral_norm(h.bottleneck[0]),
    "parametrized": lambda h: nn.utils.parametrizations.weight_norm(h.bottleneck[0]),
    "level: standardised": lambda h: exchange(h.ppm.features[1], 1, standardise),
    "level: adapted": lambda h: exchange(h.ppm.features[1], 1, Adapted),
    "level: norm of its own": lambda h: exchange(h.ppm.features[1], 2, norm_relu),
    "level: hook on the convolution": lambda h: h.ppm.features[2][1].register_forward_hook(lambda m, i, o: o * 2),
    "level: hook on the norm": lambda h: h.ppm.features[2][2].register_forward_hook(lambda m, i, o: o * 2),
    "level: hook on the activation": lambda h: h.ppm.features[2][3].register_forward_hook(lambda m, i, o: o + 1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("special", SPECIAL)
def test_layers_that_do_more_than_theirs_run_as_they_are(special, training):
    module = make_head()
    before = copy.deepcopy(module).train(training)
    torch.manual_seed(1)
    SPECIAL[special](module)
    module.double().train(training)
    x = X.double()
    with torch.no_grad():
        expected = StockHead(copy.deepcopy(module)).train(training)(x)
        # in training a norm undoes a factor
        assert training or special == "parametrized" or not torch.allclose(before.double()(x), expected, atol=1e-3)
        torch.testing.assert_close(copy.deepcopy(module)(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_hooks_of_the_pyramid_run():
    module = make_head().eval()
    module.ppm.register_forward_hook(lambda m, i, o: o * 2)
    with torch.no_grad():
        torch.testing.assert_close(module(X), module.bottleneck(2 * StockPPM(module.ppm)(X)))
