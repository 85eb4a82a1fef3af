"""An image alone and in a batch gives the same bits: no kernel's order of sums depends on how many images there are."""

import pytest
import torch
from kernel_calls import BINS, CELLS, Call, calls
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poison")
o = torch.ops.pspnet_fast
CASES = [  # the most images where a GPU's threads, or a CPU's, then share out the work in other ways than for one
    (torch.float32, "contiguous", 257),
    (torch.float32, "channels_last", 33),
    (torch.bfloat16, "contiguous", 257),
    (torch.bfloat16, "channels_last", 33),
    (torch.float64, "contiguous", 33),
]
NONE = 0
OPERATORS = [name for name in calls(torch.float32, "contiguous") if name != "confusion_matrix_"]  # sums over the batch


def assert_same_bits(call: Call, images: list[int]) -> None:
    """Of what has a part of every image; weights' gradients are sums over the batch."""
    count = len(call.given[0])
    alone = [call.run([tensor[i : i + 1].clone() for tensor in call.given]) for i in images]
    together = call.run(call.given)
    compared = 0
    for number, whole in enumerate(together):
        if whole.dim() < 3 or len(whole) != count:
            continue
        compared += 1
        for i, results in zip(images, alone, strict=True):
            assert torch.equal(bits(results[number]), bits(whole[i : i + 1])), f"result {number} of image {i}"
    assert compared > 0


def bits(tensor: Tensor) -> Tensor:
    """NaN, which the poison leaves around what is written, equals itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


@pytest.mark.parametrize(("dtype", "layout", "images"), CASES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_image_alone_and_in_a_batch(device, operator, dtype, layout, images):
    assert_same_bits(calls(dtype, layout, images, NONE, device)[operator], [0, images - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_by_running_statistics(device, dtype):
    """By the batch's own it has to depend on it."""
    reduced, grad = torch.randn(2, 33, CELLS, 16).to(device, dtype)
    weight, bias, mean, variance = [[torch.rand(16, device=device) + 0.5 for _ in range(2)] for _ in range(4)]
    statistics = torch.rand(2, 2, 16, device=device)

    def forward(x: Tensor) -> Tensor:
        return o.pyramid_batch_norm(x, weight, bias, mean, variance, [0, 0], [0.1] * 2, [1e-5] * 2, True, BINS)[0]

    def backward(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return o.pyramid_batch_norm_backward(g, x, y, weight, statistics, [0, 0], [1e-5] * 2, BINS)[0]

    output = forward(reduced)
    assert_same_bits(Call(forward, [reduced]), [0, 32])
    assert_same_bits(Call(backward, [grad, reduced, output]), [0, 32])


@pytest.mark.parametrize("images", [16, 128])
def test_the_one_exception(device, images, request):
    """pyramid_reduce on a GPU takes another tile of its matrix product where there are many rows."""
    pooled, weights = torch.randn(images, 7, 256), [torch.randn(512, 256).to(device) for _ in range(2)]
    whole, alone = (o.pyramid_reduce(x.to(device), weights, [], [], False, BINS) for x in (pooled, pooled[:1]))
    on_cpu = request.node.callspec.params["device"] == "cpu"
    assert torch.equal(whole[:1], alone) is (on_cpu or images == 16)
