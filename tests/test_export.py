"""export: files of other runtimes, run against PyTorch."""

import importlib.util
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_backbone import ToyBackbone

from pspnet_fast import PSPNet, export
from pspnet_fast.deploy import difference_of, formats
from pspnet_fast.deploy.graph import graph_of

RUNTIMES = ("onnx", "onnxscript", "onnxruntime", "openvino")
needs_runtimes = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in RUNTIMES), reason="needs pspnet_fast[export]"
)
pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones", "one_thread")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def model() -> PSPNet:
    torch.manual_seed(0)
    model = PSPNet(5, ToyBackbone()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def logits(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return F.interpolate(model(image)["out"], image.shape[2:], mode="bilinear", align_corners=True)


@needs_runtimes
def test_one_size(model, tmp_path: Path):
    """At most 40 nodes beyond the backbone's, none of them ours, no pooling of other kinds and no concatenated map."""
    import onnx

    image = torch.randn(1, 3, 65, 89)
    report = export(model, image, path=tmp_path / "a.onnx")
    assert report.difference < 1e-5
    assert_few_nodes(tmp_path / "a.onnx")
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert not {"AveragePool", "GlobalAveragePool", "BatchNormalization"} & {node.op_type for node in graph.node}
    convolutions = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    channels = {t.name: t.dims[1] for t in graph.initializer if len(t.dims) == 4}
    assert [channels[name] for name in convolutions] == [3, 8, 8, 8, 8, 8, 2]  # 16 with the concatenation


def assert_few_nodes(path: Path, normalisation: int = 0):
    """At most 40 beyond the backbone's, of no domain but ONNX's."""
    import onnx

    found = onnx.load(path)
    assert not found.functions
    assert all(node.domain == "" for node in found.graph.node)
    backbone = 2 * 5  # convolutions with their norms in them, and ReLU
    assert len(found.graph.node) <= 40 + backbone + normalisation


@needs_runtimes
def test_any_size_of_uint8(model, tmp_path: Path):
    path, image = tmp_path / "a.onnx", torch.randint(256, (1, 64, 72, 3), dtype=torch.uint8)
    export(model, image, path=path, dynamic=True, normalise=(MEAN, STD))
    assert_few_nodes(path, normalisation=4)
    assert formats.onnx_runner(path)(F.pad(image, (0, 0, 0, 3, 0, 5))).shape == (1, 5, 69, 75)


@needs_runtimes
def test_any_size(model, tmp_path: Path):
    """One file for all sizes and batches, those included that no bin divides, in both runtimes; of few nodes."""
    path = tmp_path / "a.onnx"
    assert export(model, torch.randn(1, 3, 64, 72), path=path, dynamic=True).difference < 1e-5
    assert_few_nodes(path)
    by_onnx, by_openvino = formats.onnx_runner(path), formats.openvino_runner(path)
    for size in ((1, 3, 64, 72), (2, 3, 65, 73), (1, 3, 33, 120), (3, 3, 17, 21), (2, 3, 4, 7), (1, 3, 3, 2)):
        image = torch.randn(size)
        expected = logits(model, image)
        assert difference_of(by_onnx(image), expected) < 1e-5
        assert difference_of(by_openvino(image), expected) < 1e-4


def test_portable_programs(model, tmp_path: Path):
    """For torch itself without our operators, from uint8 to classes, and with them."""
    image = torch.randint(256, (2, 41, 33, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = logits(model, (image.permute(0, 3, 1, 2) / 255 - mean) / std).argmax(1)
    settings = {"format": "torch-export", "argmax": True, "normalise": (MEAN, STD)}
    for portable in (True, False):
        report = export(model, image, path=tmp_path / "a.pt2", portable=portable, **settings)
        assert report.difference < 0.001
        program = torch.export.load(tmp_path / "a.pt2")
        ours = [node for node in program.graph.nodes if "pspnet_fast" in str(node.target)]
        assert bool(ours) != portable
        with torch.no_grad():
            found = program.module()(image)
        assert found.dtype == torch.uint8
        assert (found != expected).float().mean() < 0.001


def test_exporting_leaves_the_model_as_it_was(model, tmp_path: Path):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, torch.randn(1, 3, 41, 33), path=tmp_path / "a.pt2", format="torch-export")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


class Upsampling(nn.Module):
    """A head of two maps and a pyramid of its own, written as others do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(b) for b in (1, 2, 3))
        self.conv, self.norm = nn.Conv2d(40, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, image: Tensor) -> Tensor:
        a = self.first(image).relu()
        b = self.second(a).relu()
        maps = [F.interpolate(m, a.shape[2:], mode="bilinear") for m in (b, *(pool(b) for pool in self.pools))]
        return F.relu(self.norm(self.conv(torch.cat([a, *maps], 1))))


def test_fused_models(monkeypatch):
    """They are exported as they run: no map is upsampled, none pooled but by products, and one convolution takes 8."""
    from pspnet_fast import fuse
    from pspnet_fast.fusion import convolution

    monkeypatch.setattr(convolution, "LEAST_CHANNELS", 0)
    torch.manual_seed(0)
    stock = Upsampling().eval()
    stock.norm.running_mean.normal_()
    image = torch.randn(2, 3, 66, 50)
    with torch.no_grad():
        expected = stock(image)
    fused = fuse(stock, modules=[""])
    for portable in (True, False):
        program = graph_of(fused, (image,), portable=portable)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        stock_ones = ("upsample", "adaptive", "batch_norm") if portable else ("upsample",)
        assert not [target for target in targets if any(name in target for name in stock_ones)]
        assert any("pspnet_fast" in target for target in targets) != portable
        with torch.no_grad():
            torch.testing.assert_close(program.module()(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "a.onnx", "format": "tensorrt"}, "format must be one of 'onnx'"),
        ({"path": "a.pt2"}, "path must end in .onnx"),
        ({"path": "a.onnx", "normalise": (MEAN, STD)}, "example must be .* uint8"),
        ({"path": "a.onnx", "example": torch.zeros(3, 8, 8)}, "example must be a tensor"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        export(model, **{"example": torch.zeros(1, 3, 8, 8), **arguments})


@pytest.mark.parametrize("ending", ["onnx", "xml", "mlpackage"])
def test_a_file_is_replaced_whole_or_not_at_all(ending, tmp_path: Path, monkeypatch):
    """By one file, by two, and by a folder; where writing fails nothing is left of it."""
    path, beside = tmp_path / f"a.{ending}", tmp_path / "a.bin"
    name = {"onnx": "onnx", "xml": "openvino", "mlpackage": "coreml"}[ending]

    def content() -> list[tuple[str, bytes]]:
        return sorted((file.name, file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file())

    def write(text: bytes, fails: bool, program: object, new: Path, dynamic: bool) -> None:
        files = {"onnx": [new], "xml": [new, new.with_suffix(".bin")], "mlpackage": [new / "weights"]}[ending]
        for file in files:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(text)
        if fails:
            raise OSError("disk full")

    for text, fails in ((b"old", False), (b"new", False), (b"half", True)):
        monkeypatch.setitem(formats.WRITERS, name, partial(write, text, fails))
        with pytest.raises(OSError, match="disk full") if fails else nullcontext():
            export(nn.Conv2d(3, 2, 1), torch.randn(1, 3, 5, 5), path=path, format=name)
        expected = {"onnx": ["a.onnx"], "xml": ["a.bin", "a.xml"], "mlpackage": ["weights"]}[ending]
        assert content() == [(file, b"new" if fails else text) for file in expected]
    assert path.exists()
    assert beside.exists() == (ending == "xml")
