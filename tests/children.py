"""What people do to the layers inside a head, each by a package's mechanism in few lines."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations

Change = Callable[[nn.Module, str], Any]  # of the layer of a name in a model


class LowRank(nn.Module):
    """As peft puts it in place of a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        arguments: Any = {"bias": False, "dtype": conv.weight.dtype}
        self.base_layer = conv.requires_grad_(False)
        self.lora_A = nn.Conv2d(conv.in_channels, 2, conv.kernel_size, padding=conv.padding, **arguments)
        self.lora_B = nn.Conv2d(2, conv.out_channels, 1, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias


class Saved(nn.Module):
    """As peft's modules_to_save wraps a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module, self.saved = module, nn.Sequential(module, nn.Softsign())

    def forward(self, x: Tensor) -> Tensor:
        return self.saved(x)


class Standardised(nn.Conv2d):
    """Weight standardisation, as in timm and BiT."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, 1, self.padding)


class Halved(nn.Conv2d):
    """Overrides what nn.Conv2d's own forward calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / 2, bias)


class NormAct(nn.BatchNorm2d):
    """A batch norm with the activation in it, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class Half(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def exchanged(make: Callable[[Any], nn.Module]) -> Change:
    def change(model: nn.Module, name: str) -> None:
        model.set_submodule(name, make(model.get_submodule(name)))

    return change


def on(do: Callable[[Any], Any]) -> Change:
    return lambda model, name: do(model.get_submodule(name))


def as_class(cls: type[nn.Module]) -> Change:
    """Weights and all stay: only the class is another."""
    return on(lambda module: setattr(module, "__class__", cls))


def doubled(module: nn.Module) -> None:
    """As accelerate, DeepSpeed and others set a forward on the instance."""
    forward = module.forward
    module.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]


def observed(module: nn.Module) -> None:
    """As torch.ao's eager mode prepares a layer: an observer that is called by a hook."""
    module.add_module("activation_post_process", quantization.MinMaxObserver(dtype=torch.quint8).double())
    module.register_forward_hook(lambda m, i, o: m.activation_post_process(o))


def own_samples(module: nn.Module) -> None:
    """As Opacus computes gradients of each sample: inputs by a forward hook, gradients by a backward hook."""
    inputs: list[Tensor] = []
    module.register_buffer("grad_sample", torch.zeros((), dtype=torch.float64))
    module.register_forward_hook(lambda m, i, o: inputs.append(i[0].detach()))

    def collect(m: nn.Module, grad_input: Any, grad_output: Any) -> None:
        m.grad_sample = torch.einsum("nchw,nohw->", inputs.pop(), grad_output[0])  # type: ignore[assignment]

    module.register_full_backward_hook(collect)


CONVOLUTION: dict[str, Change] = {
    "LoRA": exchanged(LowRank),
    "weight standardisation": as_class(Standardised),
    "own _conv_forward": as_class(Halved),
    "pruned": on(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "older weight_norm": on(nn.utils.weight_norm),
    "older spectral_norm": on(nn.utils.spectral_norm),
    "weight_norm": on(parametrizations.weight_norm),
    "spectral_norm": on(parametrizations.spectral_norm),
    "parametrized": on(lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Half())),
    "Opacus": on(own_samples),
}
NORM: dict[str, Change] = {"norm and activation": as_class(NormAct)}
ANY: dict[str, Change] = {
    "forward hook": on(lambda m: m.register_forward_hook(lambda m, i, o: o * 2)),
    "forward pre-hook": on(lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] * 2,))),
    "backward hook": on(lambda m: m.register_full_backward_hook(lambda m, i, o: (i[0] * 2,))),
    "backward pre-hook": on(lambda m: m.register_full_backward_pre_hook(lambda m, o: (o[0] * 2,))),
    "observer": on(observed),
    "own forward": on(doubled),
    "wrapped": exchanged(Saved),
}
