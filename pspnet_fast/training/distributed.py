"""Training by several processes, as torchrun starts them: who they are, and what they tell each other."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class World:
    """The processes of a training run, and which of them this is; by default it is alone.

    Attributes:
        rank, size: number of this process, from 0, and their number.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """As torchrun tells it.

        Raises:
            ValueError: several processes, but what torchrun sets is not complete.
        """
        size = int(environment.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if missing := [
            name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment
        ]:
            raise ValueError(
                f"WORLD_SIZE = {size} asks for several processes, but {' and '.join(missing)} must be set as well: "
                "start them with torchrun"
            )
        return cls(int(environment["RANK"]), size, int(environment["LOCAL_RANK"]))

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """(rank, size)."""
        return self.rank, self.size

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added up over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def greatest(self, number: int, device: torch.device) -> int:
        """The greatest of the processes' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value.item())


def join(world: World, device: torch.device) -> None:
    """Connect the processes of ``world``, unless they are: by NCCL on GPUs, else by gloo.

    They stay connected: torchrun's processes cannot be a second time, and after an error to take leave could hang.
    """
    if world.size == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=world.rank, world_size=world.size)


def leave() -> None:
    """Part with the other processes, at the end of a program that ran well."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, of which every process goes on with one."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        output = input.clone()
        dist.all_reduce(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


class _CPUSyncBatchNorm(_BatchNorm):
    """nn.SyncBatchNorm, which knows GPUs alone, for CPUs: by sums over all processes."""

    process_group = None  # all processes; what else knows synchronised norms looks for this attribute

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        values = input.to(torch.promote_types(input.dtype, self.running_mean.dtype))  # type: ignore[union-attr]
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1, *(1 for _ in axes[1:])]
        count = _Sum.apply(values.new_tensor(float(input.numel() // input.size(1))))
        mean = _Sum.apply(values.sum(axes)) / count
        centred = values - mean.view(shape)
        var = _Sum.apply(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._track(mean.detach(), var.detach() * (count / (count - 1)))
        output = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / self.num_batches_tracked.item()  # type: ignore[union-attr]
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)  # type: ignore
        self.running_var.lerp_(unbiased_var.to(self.running_var), momentum)  # type: ignore


@contextmanager
def synchronised_norms(model: nn.Module, world: World) -> Iterator[None]:
    """While the context is open, batch norms in training have the statistics of all processes' images.

    ``model`` is on its device. In place of each batch norm stands a synchronised one that shares its tensors.
    """
    replaced = []
    if world.size > 1:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, _BatchNorm):
                    replaced.append((parent, name, child))
                    setattr(parent, name, _synchronised(child))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            child.train(getattr(parent, name).training)
            setattr(parent, name, child)


def _synchronised(norm: _BatchNorm) -> nn.Module:
    settings = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    tensors = [*norm.parameters(), *norm.buffers()]
    kind = nn.SyncBatchNorm if tensors and tensors[0].is_cuda else _CPUSyncBatchNorm
    other = kind(*settings)
    other._parameters, other._buffers = norm._parameters, norm._buffers
    return other.train(norm.training)
