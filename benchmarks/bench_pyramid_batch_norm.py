"""pyramid_batch_norm against its reference, in training: forward and backward."""

from collections.abc import Callable

import pytest
import torch
from comparison import IMPLEMENTATIONS, Comparison, chosen, nbytes
from torch import Tensor

from pspnet_fast import ops, reference

BINS, REDUCED = (1, 2, 3, 6), 512


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [2, 16])
def test_pyramid_batch_norm(
    measure: Callable[..., None], device: torch.device, batch: int, dtype: torch.dtype, implementation: str
) -> None:
    op = chosen(implementation, reference.pyramid_batch_norm, ops.pyramid_batch_norm)
    reduced = torch.randn(batch, 50, REDUCED, dtype=dtype, device=device, requires_grad=True)
    norm = [(*torch.rand(4, REDUCED, device=device).unbind(), 1e-5) for _ in BINS]
    grad = torch.randn_like(reduced)

    def step() -> tuple[Tensor, ...]:
        output = op(reduced, BINS, norm, training=[True] * 4, momentum=[0.1] * 4, relu=True)
        return torch.autograd.grad(output, reduced, grad)

    against = Comparison(
        "pyramid_batch_norm", f"batch {batch} {str(dtype).removeprefix('torch.')}", 5 * nbytes(reduced)
    )
    measure(against, implementation, step)
