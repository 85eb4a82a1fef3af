"""Whether a fused computation may stand in for calling a module, and take a tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import is_tensor_like
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .ops._library import transforms_active


def needs_plain(input: Any) -> bool:
    """Whether a map has to go through torch's own functions, one by one, which are right for all that it may be.

    For forward-mode AD and torch.func, while torch.jit.trace or torch.fx record (a graph that needs no operators of
    ours, for any size), and for tensor subclasses that see every function, such as MONAI's MetaTensor.
    """
    if transforms_active():
        return True
    if torch.compiler.is_compiling():
        return is_traceable_wrapper_subclass(input)
    return is_tensor_like(input) and (torch.jit.is_tracing() or not _is_ordinary(input))


def _is_ordinary(tensor: Any) -> bool:
    """Whether no class of its own sees what torch's functions do with a tensor."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return True
    disabled = torch._C._disabled_torch_function_impl  # such as nn.Parameter's and those of torch's own fakes
    return type(tensor).__torch_function__ is disabled and not is_traceable_wrapper_subclass(tensor)


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
    """Whether calling a module is F.conv2d of the weight and bias that it holds."""
    return (
        isinstance(module, nn.Conv2d)
        and runs_only(module, nn.Conv2d.forward)
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and _holds(module, "weight", "bias")
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Whether calling a module is F.batch_norm, so that in evaluation it is an affine map by its buffers."""
    return (
        isinstance(module, _BatchNorm)
        and runs_only(module, _BatchNorm.forward, nn.SyncBatchNorm.forward)
        and _holds(module, "weight", "bias", "running_mean", "running_var")
    )


def has_statistics(norm: nn.Module) -> bool:
    """Whether a batch norm is an affine map by its buffers now: in evaluation mode, with nothing left out."""
    if not is_batch_norm(norm) or norm.training:
        return False
    return all(t is not None for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))


def _holds(module: nn.Module, *names: str) -> bool:
    """Whether these are ordinary tensors that a module holds, or None.

    Not those that its class computes whenever they are read, as a parametrization does, perhaps with a step of its own
    (spectral norm), nor sharded or otherwise special ones.
    """
    compiling = torch.compiler.is_compiling()
    for name in names:
        if hasattr(type(module), name):
            return False
        tensor = getattr(module, name)
        if tensor is not None and (is_traceable_wrapper_subclass(tensor) if compiling else not _is_ordinary(tensor)):
            return False
    return True


def is_relu(module: nn.Module) -> bool:
    """Whether calling a module is F.relu."""
    return isinstance(module, nn.ReLU) and runs_only(module, nn.ReLU.forward)


def is_identity(module: nn.Module) -> bool:
    """Whether calling a module does nothing."""
    return isinstance(module, nn.Identity) and runs_only(module, nn.Identity.forward)
