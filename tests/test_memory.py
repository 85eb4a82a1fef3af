"""Memory of the forward pass: the output, and 5 MB at most for everything else; of the head, that of a convolution."""

import sys

import pytest
import torch
from forward_memory import forward_memory

SHAPE = (2, 2048, 60, 60)
HEAD = (2, 1024, 60, 60)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc"),
    pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True),  # a process of its own measures
]


def extra_megabytes(implementation, dtype, memory_format, device, training) -> float:
    output = 2 * SHAPE[0] * SHAPE[1] * SHAPE[2] * SHAPE[3] * dtype.itemsize
    peak = forward_memory(implementation, SHAPE, dtype, memory_format, device, training)
    assert peak > 0.99 * output, "the measure does not even see the output"
    return (peak - output) / 1e6


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_needs_the_output_and_little_more(device, dtype, memory_format, training):
    assert extra_megabytes("fused", dtype, memory_format, device, training) <= 5


def test_the_measure_sees_intermediate_maps(device):
    """The stock module holds the upsampled maps besides the output: half of it, 59 MB."""
    assert extra_megabytes("stock", torch.float32, torch.contiguous_format, device, training=False) > 50


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_head_needs_what_its_convolution_of_x_needs(device, memory_format, training):
    """At most 10 MB more, where the concatenated head needs the concatenation and its copies, 105 MB.

    And what it takes of the weight: a part while it is used, in training both until they are. On a CPU the plain
    convolution copies that as well, into oneDNN's layout; on a GPU it does in channels_last.
    """
    names = ("convolution", "fused head", "stock head")
    convolution, head, stock = (
        forward_memory(name, HEAD, torch.float32, memory_format, device, training) / 1e6 for name in names
    )
    parts = 256 * 1024 * 9 * 4 / 1e6 if device.type == "cuda" else 0.0  # of the weight, each of the two
    assert head <= convolution + 10 + parts * (2 if training else 1)
    assert stock > head + 50, "the measure does not see the concatenation"
