"""pyramid_split_weight: every bit against plain torch, gradients, registration, bad input."""

import pytest
import torch
from cases import DTYPES
from torch import Tensor

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")

raw = torch.ops.pspnet_fast
KERNELS = [(1, 1), (3, 3), (5, 7)]  # 5 x 7: more taps than a tile of the CUDA kernel has
CHANNELS = [(1, 1, 1), (19, 3, 5), (130, 4, 65), (264, 2, 40)]  # dense, levels, channels of a level; the last: vectors


def make(shape, layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    weight = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    if layout == "channels_last":
        return weight.contiguous(memory_format=torch.channels_last)
    return weight.transpose(0, 3).contiguous().transpose(0, 3) if layout == "transposed" else weight


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(
    ("dtype", "parts"), [(t, None) for t in DTYPES] + [(torch.float32, t) for t in (torch.bfloat16, torch.float16)]
)
@pytest.mark.parametrize("dense_first", [True, False])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients(device, kernel, channels, dense_first, dtype, parts, layout):
    dense, levels, r = channels
    weight = make((3, dense + levels * r, *kernel), layout, dtype, device)
    results = []
    for module in (ops, reference):
        leaf = weight.detach().requires_grad_()
        first, matrices = module.pyramid_split_weight(leaf, dense, levels, dense_first=dense_first, dtype=parts)
        grads = first.detach().cos(), matrices.detach().cos()
        results.append([first, matrices, *torch.autograd.grad([first, matrices], leaf, grads)])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)
    if layout != "transposed":
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert results[0][0].is_contiguous(memory_format=memory_format)
        assert results[0][2].is_contiguous(memory_format=memory_format)


def test_with_pyramid_reduce_it_gives_taps(device):
    """The products of a level's cells with its part of the weight, tap by tap."""
    weight = make((5, 4 + 2 * 3, 3, 3), "contiguous", torch.float64, device)
    reduced = torch.randn(2, 5, 3, dtype=torch.float64, device=device)
    _, matrices = ops.pyramid_split_weight(weight, 4, 2)
    taps = ops.pyramid_reduce(reduced, matrices.unbind(), (1, 2)).view(2, 5, 9, 5)
    for level, cells in enumerate((slice(0, 1), slice(1, 5))):
        part = weight[:, 4 + 3 * level : 7 + 3 * level].flatten(2)
        expected = torch.einsum("npc,oct->npto", reduced[:, cells], part)
        torch.testing.assert_close(taps[:, cells], expected, rtol=1e-12, atol=1e-12)


def test_gradcheck(device):
    weight = make((2, 7, 3, 1), "contiguous", torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ops.pyramid_split_weight(w, 3, 2), weight)
    assert torch.autograd.gradgradcheck(lambda w: ops.pyramid_split_weight(w, 3, 2), weight)


def test_the_gradient_of_one_part_alone(device):
    weight = make((2, 7, 3, 1), "channels_last", torch.float32, device).requires_grad_()
    first, matrices = ops.pyramid_split_weight(weight, 3, 2)
    (grad,) = torch.autograd.grad(matrices.sum(), weight, retain_graph=True)
    assert torch.equal(grad, torch.cat([torch.zeros(2, 3, 3, 1), torch.ones(2, 4, 3, 1)], 1).to(device))
    (grad,) = torch.autograd.grad(first.sum(), weight)
    assert torch.equal(grad, torch.cat([torch.ones(2, 3, 3, 1), torch.zeros(2, 4, 3, 1)], 1).to(device))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(device, layout, requires_grad):
    weight = make((2, 7, 3, 2), layout, torch.float32, device).requires_grad_(requires_grad)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(raw.pyramid_split_weight.default, (weight, 3, False, 2, dtype))
    grads = torch.randn(2, 3, 3, 2, device=device), torch.randn(2, 12, 2, device=device)
    settings = (True, layout == "channels_last", torch.float32)
    torch.library.opcheck(raw.pyramid_split_weight_backward.default, (*grads, *settings))


WEIGHT = torch.zeros(2, 10, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((WEIGHT[0], 4, 2), {}, ValueError, r"weight must have shape \(O, C, kh, kw\), but has \(10, 3, 3\)"),
        ((WEIGHT.long(), 4, 2), {}, TypeError, "weight must be float32, float64, bfloat16 or float16, but is int64"),
        ((WEIGHT[:0], 4, 2), {}, ValueError, "weight must have no dimension of size 0"),
        ((WEIGHT, 10, 2), {}, ValueError, "dense must be from 1 to 9 for a weight of 10 channels, but is 10"),
        ((WEIGHT, 4, 17), {}, ValueError, "levels must be from 1 to 16 .* but is 17"),
        ((WEIGHT, 4.0, 2), {}, TypeError, "dense must be an int, but is 4.0"),
        ((WEIGHT, 4, 4), {}, ValueError, "levels must share weight's other 6 channels evenly, but there are 4"),
        ((WEIGHT, 4, 2), {"dense_first": 1}, TypeError, "dense_first must be True or False, but is 1"),
        ((WEIGHT, 4, 2), {"dtype": torch.float64}, TypeError, "dtype must be that of weight, torch.float32"),
        ((WEIGHT.half(), 4, 2), {"dtype": torch.bfloat16}, TypeError, "dtype must be that of weight, torch.float16"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.pyramid_split_weight(*arguments, **options)


def test_the_raw_operator_checks_too():
    with pytest.raises(RuntimeError, match="as many for each of 4 levels, but has 10"):
        raw.pyramid_split_weight(WEIGHT, 4, True, 4, torch.float32)
    with pytest.raises(RuntimeError, match="the parts must have the dtype of the weight"):
        raw.pyramid_split_weight(WEIGHT, 4, True, 2, torch.float64)
    with pytest.raises(RuntimeError, match="grad_matrices has the wrong shape"):
        raw.pyramid_split_weight_backward(WEIGHT, torch.zeros(2, 17, 3), True, False, torch.float32)
