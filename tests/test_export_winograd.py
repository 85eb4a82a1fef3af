"""export(winograd=True): large convolutions of a graph as products with matrices."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_backbone import ToyBackbone

from pspnet_fast import PSPNet, export
from pspnet_fast.deploy import formats, graph
from pspnet_fast.deploy import winograd as deployed
from pspnet_fast.optimization import winograd

pytestmark = pytest.mark.usefixtures("one_thread", "small_maps_as_large_ones")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small convolutions are rewritten too."""
    monkeypatch.setattr(deployed, "_LEAST_WEIGHTS", 0)
    monkeypatch.setattr(winograd, "_LEAST_PIXELS", 64)


@pytest.mark.parametrize("dilation", [1, 2, 3, (1, 2)])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 31])
def test_axes(size, dilation):
    """The matrices of the axes and the weight's make the convolution, whatever juts out of the map."""
    dilation = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    x, weight = torch.randn(size, size + 1, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    (rows, row_results), (columns, column_results) = (
        deployed.axis_matrices(s, d) for s, d in zip(x.shape, dilation, strict=True)
    )
    places = winograd.transformed_weight(weight[None, None]).view(5, 5)
    seen = (rows @ x @ columns.t()).view(5, len(rows) // 5, 5, len(columns) // 5)
    found = (seen * places[:, None, :, None]).reshape(len(rows), len(columns))
    expected = F.conv2d(x[None, None], weight[None, None], padding=dilation, dilation=dilation)[0, 0]
    torch.testing.assert_close(row_results.t() @ found @ column_results, expected)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=2, dilation=2)
        self.second = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        kinds = [{"stride": 2}, {"padding": 0}, {"groups": 2}, {"kernel_size": (3, 1), "padding": (1, 0)}]
        self.others = nn.ModuleList(nn.Conv2d(6, 6, **{"kernel_size": 3, "padding": 1, **kind}) for kind in kinds)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(self.first(image).relu()))
        return sum(layer(x).mean((2, 3), keepdim=True) for layer in self.others) + x


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("batch", [1, 2])
def test_which_convolutions(batch):
    """Those of one group that keep their map; and small ones as they are."""
    model, image = Convolutions().eval(), torch.randn(batch, 3, 19, 26)
    model.norm.running_mean.normal_()
    for size, products in ((image, 2 * 5), (image[:, :, :5, :5], 0)):
        program = graph.graph_of(model, (size,), winograd=True)
        targets = [node.target for node in program.graph.nodes]
        assert targets.count(torch.ops.aten.matmul.default) == products
        assert targets.count(torch.ops.aten.conv2d.default) == 6 - products // 5
        with torch.no_grad():
            torch.testing.assert_close(program.module()(size), model(size), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_runtimes(format, tmp_path: Path):
    if any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime", "openvino")):
        pytest.skip("needs pspnet_fast[export]")
    path = tmp_path / {"onnx": "a.onnx", "openvino": "a.xml"}[format]
    model, image = PSPNet(5, ToyBackbone()).eval(), torch.randn(1, 3, 97, 105)
    assert export(model, image, path=path, format=format, winograd=True).difference < 1e-5
    if format == "onnx":
        import onnx

        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("Conv") == 7 - 4  # three of the backbone's, and the bottleneck's part of the map
        assert len(kinds) - 2 * 5 - 3 * 10 <= 40  # a rewritten one has 11 nodes
        assert formats.onnx_runner(path)(image).shape == (1, 5, 97, 105)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dynamic": True}, "winograd must be False with dynamic"),
        (
            {"path": "a.pt2", "format": "torch-export"},
            "winograd must be False for format 'torch-export' unless portable",
        ),
    ],
)
def test_where_it_is_refused(arguments, message, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        export(PSPNet(5, ToyBackbone()), torch.randn(1, 3, 33, 33), winograd=True, **{"path": "a.onnx"} | arguments)
    assert not list(tmp_path.iterdir())
