"""pyramid_split_weight against its reference: forward and backward, as the head splits its 3x3 weight."""

from collections.abc import Callable

import pytest
import torch
from comparison import IMPLEMENTATIONS, Comparison, chosen, nbytes

from pspnet_fast import ops, reference


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels_last"]
)
def test_pyramid_split_weight(
    measure: Callable[..., None],
    device: torch.device,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    direction: str,
    implementation: str,
) -> None:
    op = chosen(implementation, reference.pyramid_split_weight, ops.pyramid_split_weight)
    weight = torch.randn(512, 4096, 3, 3, dtype=dtype, device=device).contiguous(memory_format=memory_format)
    case = f"{str(dtype).removeprefix('torch.')} {str(memory_format).removeprefix('torch.')} {direction}"
    against = Comparison("pyramid_split_weight", case, 2 * nbytes(weight))
    if direction == "forward":
        with torch.no_grad():
            measure(against, implementation, lambda: op(weight, 2048, 4))
        return
    parts = op(weight.requires_grad_(), 2048, 4)
    grads = [torch.randn_like(part) for part in parts]
    measure(against, implementation, lambda: torch.autograd.grad(parts, weight, grads, retain_graph=True))
