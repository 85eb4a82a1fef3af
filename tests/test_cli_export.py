"""pspnet-fast export, from a trained run to a file that was held against PyTorch."""

import importlib.util
import re
from pathlib import Path

import pytest
from toy_command import Workspace, assert_one_line, run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime", "openvino")),
        reason="needs pspnet_fast[export]",
    ),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("export"))


def difference(output: str) -> float:
    found = re.search(r"differs from PyTorch by (\S+) on the example", output)
    assert found is not None, output
    return float(found[1])


def test_a_run_becomes_a_file_and_none_is_replaced(work: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    command = ["export", "--checkpoint", work.checkpoint, "--out", path]
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert difference(result.output) < 1e-4
    before = path.read_bytes()
    assert_one_line(run(*command, "--argmax"), 2, "--out", str(path), "--overwrite")
    assert path.read_bytes() == before
    result = run(*command, "--argmax", "--overwrite")
    assert result.exit_code == 0, result.output
    assert path.read_bytes() != before


def test_eight_bits_say_what_they_cost(work: Workspace, tmp_path: Path) -> None:
    """OpenVINO's file comes from ONNX Runtime's."""
    path = tmp_path / "toy.xml"
    settings = ["--format", "openvino", "--normalise", "--int8", work.data]
    result = run("export", "--checkpoint", work.checkpoint, "--out", path, *settings)
    assert result.exit_code == 0, result.output
    assert difference(result.output) < 1e-4
    kept = re.search(r"(\d+\.\d+) ?% of the pixels", result.output)
    assert kept is not None, result.output
    assert 0 < float(kept[1]) <= 100
    assert path.stat().st_size > 0


def test_matrices_of_any_size_keep_their_bits(work: Workspace, tmp_path: Path) -> None:
    """Of a dynamic file's convolutions all are quantised but the one that shifts the upsampling weights."""
    import onnx

    path = tmp_path / "toy.onnx"
    result = run("export", "--checkpoint", work.checkpoint, "--out", path, "--dynamic", "--int8", work.data)
    assert result.exit_code == 0, result.output
    graph = onnx.load(path).graph
    source = {name: node.op_type for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    plain = [node for node in convolutions if source.get(node.input[0]) != "DequantizeLinear"]
    assert len(convolutions) > len(plain)
    assert [source[node.input[0]] for node in plain] == ["Resize"]
    assert_one_line(
        run("export", "--checkpoint", work.checkpoint, "--out", tmp_path / "b.onnx", "--winograd", "--int8", work.data),
        2,
        "--winograd",
        "--int8",
    )


def test_what_cannot_be_exported_is_told(work: Workspace, tmp_path: Path) -> None:
    command = ["export", "--checkpoint", work.checkpoint, "--out"]
    assert_one_line(run(*command, tmp_path / "a.pt2"), 1, "path", ".onnx")
    assert_one_line(run(*command, tmp_path / "a.onnx", "--size", "0"), 2, "--size", "0")
    assert_one_line(run(*command, tmp_path / "a.onnx", "--int8", tmp_path), 1, "--int8", "at least 4 images")
    assert_one_line(run(*command, tmp_path / "a.pt2", "--format", "aoti", "--int8", work.data), 2, "--int8", "aoti")
    assert list(tmp_path.iterdir()) == []
