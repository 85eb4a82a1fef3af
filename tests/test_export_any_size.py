"""export(dynamic=True): the pyramid's matrices as resized pictures of its cells."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from pspnet_fast import FusedPPM, FusedPSPHead, export
from pspnet_fast.deploy import any_size, difference_of, formats
from pspnet_fast.ops import portable
from pspnet_fast.ops.checks import count_cells, unflatten

pytestmark = pytest.mark.usefixtures("one_thread", "small_maps_as_large_ones")
needs_runtimes = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime", "openvino")),
    reason="needs pspnet_fast[export]",
)
PSPNET = [1, 1, 2, 2, 3, 3, 6, 6]
SIZES = [(60, 60), (1, 1), (2, 7), (5, 3), (13, 49), (61, 41), (64, 90)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", [PSPNET, [1, 3, 4, 2], [5, 7]])
def test_pooling(size, bins):
    picture = any_size.inside(bins)
    map = torch.randn(2, 3, *size)
    found = any_size.pool(map, picture).transpose(1, 2)
    torch.testing.assert_close(found, portable.pyramid_pool_alone(map, bins), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", [PSPNET, [1, 3, 4, 2]])
@pytest.mark.parametrize(
    ("kernel", "dilation"), [([3, 3], [1, 1]), ([3, 3], [2, 3]), ([1, 1], [1, 1]), ([1, 5], [1, 1])]
)
@pytest.mark.parametrize("align_corners", [True, False])
def test_upsampling(size, bins, kernel, dilation, align_corners):
    """As adaptive pooling and bilinear upsampling have it, through every tap."""
    taps = torch.randn(2, count_cells(unflatten(bins)), kernel[0] * kernel[1], 4)
    settings = [], 0.0, True, bins, kernel, dilation, int(align_corners), True
    found, expected = torch.randn(2, 4, *size).expand(2, 2, 4, *size).clone().unbind()
    any_size._context(found, taps, *settings)
    portable.pyramid_context_(expected, taps, *settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_where_pictures_are_too_large():
    """Then there is none, and one of bilinear weights for each level."""
    assert any_size.inside([5, 7, 7, 8]) is None
    assert any_size.inside([5, 2, 6, 3]).shape == (1, 28, 30, 6)
    assert [p.shape for p in any_size.weights([6, 6, 8, 8], 1)] == [(1, 36, 6, 6), (1, 64, 8, 8)]
    assert any_size.weights([2, 2], portable.NEAREST) is None


@needs_runtimes
@pytest.mark.parametrize(("bins", "align_corners"), [((1, 2, 3, 6), False), ((2, 5, 7), True)])
def test_runtimes(bins, align_corners, tmp_path: Path):
    """One file for maps of all sizes, smaller than the bins and such that no bin divides, in both runtimes.

    PSPNet's own pyramid is in the files of test_export.py.
    """
    path = tmp_path / "head.onnx"
    ppm = FusedPPM(3, 2, bins=bins, align_corners=align_corners)
    model = FusedPSPHead(ppm, nn.Conv2d(ppm.out_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    assert export(model, torch.randn(1, 3, 17, 19), path=path, dynamic=True).difference < 1e-5
    by_onnx, by_openvino = formats.onnx_runner(path), formats.openvino_runner(path)
    for number, size in enumerate(SIZES):
        image = torch.randn(1 + number % 2, 3, *size)
        with torch.no_grad():
            expected = model(image)
        assert difference_of(by_onnx(image), expected) < 1e-5
        assert difference_of(by_openvino(image), expected) < 1e-4
