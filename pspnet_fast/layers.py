"""Whether a fused computation may stand in for calling a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def runs_only(module: nn.Module, *forwards: Callable[..., Any]) -> bool:
    """Whether calling a module runs one of these forwards and nothing else.

    False for subclasses with a forward of their own (weight standardisation, LoRA, quantisation), for a forward set on
    the instance, and where hooks are registered, on the module or for all modules. Asked at every call: users exchange
    layers and register hooks at any time.
    """
    if type(module).forward not in forwards or "forward" in module.__dict__:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and not torch.nn.modules.module._has_any_global_hook()


def is_convolution(module: nn.Module) -> bool:
    """Whether calling a module is F.conv2d of its weight and bias (parametrizations included, they give the weight)."""
    return (
        isinstance(module, nn.Conv2d)
        and runs_only(module, nn.Conv2d.forward)
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and not is_traceable_wrapper_subclass(module.weight)  # such as sharded ones
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Whether calling a module is F.batch_norm, so that in evaluation it is an affine map by its buffers."""
    return isinstance(module, _BatchNorm) and runs_only(module, _BatchNorm.forward, nn.SyncBatchNorm.forward)


def is_relu(module: nn.Module) -> bool:
    """Whether calling a module is F.relu."""
    return isinstance(module, nn.ReLU) and runs_only(module, nn.ReLU.forward)


def is_identity(module: nn.Module) -> bool:
    """Whether calling a module does nothing."""
    return isinstance(module, nn.Identity) and runs_only(module, nn.Identity.forward)
