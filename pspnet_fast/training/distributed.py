"""Training by several processes, as torchrun starts them: who they are, and what they tell each other."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
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


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Connect the processes of ``world``: by NCCL on GPUs, else by gloo; a group that the caller has opened is used."""
    if world.size == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=world.rank, world_size=world.size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class SyncBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm, which knows no CPU, on CPUs as well: there by two sums over all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        if input.device.type != "cpu" or not self.training or not dist.is_initialized():
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, self.running_mean.dtype))  # type: ignore[union-attr]
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1, *(1 for _ in axes[1:])]
        count = all_reduce(values.new_tensor(float(input.numel() // input.size(1))))
        mean = all_reduce(values.sum(axes)) / count
        centred = values - mean.view(shape)
        var = all_reduce(centred.square().sum(axes)) / count
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


def synchronise_norms(module: nn.Module) -> None:
    """Turn every batch norm below ``module``, in place, into a :class:`SyncBatchNorm` that shares its tensors."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(child)
            converted.__class__ = SyncBatchNorm
            setattr(module, name, converted)
        else:
            synchronise_norms(child)
