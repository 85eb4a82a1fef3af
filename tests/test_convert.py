"""convert: models of the same structure as the sources' give the same logits; what is assumed is said; what is wrong
is refused and nothing written. tests/peers has real packages."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import published_pspnets as packages
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_command import assert_one_line, run

from pspnet_fast.convert import Conversion, convert
from pspnet_fast.convert.sources import recognise
from pspnet_fast.models import PSPNet

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE = (1, 3, 65, 73)
WEIGHTS = "weights.safetensors"


class Case:
    """A source's model, its file, and what became of it."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.path = source, folder / WEIGHTS
        self.theirs = packages.published(source)
        self.entries = packages.entries(source, self.theirs)
        save_file(self.entries, self.path)
        self.converted: Conversion = convert(self.path)


@pytest.fixture(scope="module", params=["semseg", "mmseg V1d", "paddleseg"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("convert")
    yield Case(request.param, folder)
    shutil.rmtree(folder)  # 200 MB


def small(folder: Path, **changes: object) -> dict[str, Tensor]:
    """A semseg file of ResNet-18, with a few entries of the head; written where no whole model is needed."""
    torch.manual_seed(1)
    model = PSPNet(3, "resnet18")
    state = {**model.state_dict(), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    save_file(state, folder / WEIGHTS)  # type: ignore[arg-type]
    return state  # type: ignore[return-value]


@torch.no_grad()
def test_same_logits(case: Case) -> None:
    image = torch.randn(IMAGE)
    model = case.converted.model
    expected, auxiliary = case.theirs(image)
    features = image
    for name in ("layer0", "layer1", "layer2", "layer3"):
        features = getattr(model, name)(features)
    for actual, truth in ((model(image)["out"], expected), (model.aux(features), auxiliary)):  # type: ignore[misc]
        assert (actual - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_report(case: Case) -> None:
    report = case.converted.report
    counters = [name for name in case.converted.model.state_dict() if name.endswith("num_batches_tracked")]
    model_entries = len(case.converted.model.state_dict())
    assert len(report.loaded) == model_entries - (len(counters) if case.source == "paddleseg" else 0)
    assert len(report.remapped) == (0 if case.source == "semseg" else len(report.loaded))
    assert not [*report.missing, *report.mismatched, *report.unknown, *report.dropped, *report.warnings]
    text = str(report)
    dilation, aligned = {
        "semseg": ("full", "True"),
        "mmseg V1d": ("contracted", "False"),
        "paddleseg": ("full", "False"),
    }[case.source]
    assert f"assumed: dilation={dilation}, as " in text
    assert f"assumed: align_corners={aligned}, as " in text
    mean = [0.5] * 3 if case.source == "paddleseg" else [0.485, 0.456, 0.406]
    assert case.converted.model.metadata["mean"] == mean
    assert f"assumed: mean {mean}" in text
    assert ("6 biases were folded" in text) == ("levels stood in reverse" in text) == (case.source == "paddleseg")
    assert "self-test: not possible" in text


@torch.no_grad()
def test_the_other_dilation_is_another_model(tmp_path: Path) -> None:
    """It loads all the same, so it must be said what was taken."""
    small(tmp_path)
    full, assumed = convert(tmp_path / WEIGHTS)
    contracted, asked = convert(tmp_path / WEIGHTS, dilation="contracted")
    assert "assumed: dilation=full, as hszhao/semseg builds it: names and shapes do not show it" in str(assumed)
    assert "known: dilation=contracted, as was asked for" in str(asked)
    assert assumed.loaded == asked.loaded
    image = torch.randn(IMAGE)
    one, other = full(image)["out"], contracted(image)["out"]
    assert (one - other).norm() > 0.01 * one.norm()


@pytest.mark.parametrize("source", ["mmseg", "mmseg b", "encoding", "tramac"])
def test_other_names(source: str) -> None:
    """As these differ from those above in names and stems alone."""
    stem = {"mmseg": "deep32", "mmseg b": "conv7"}.get(source, "deep64")
    with torch.device("meta"):
        state = packages.PSPNet(5, **packages.STRUCTURES[source]).state_dict()  # type: ignore[arg-type]
        ours = PSPNet(5, stem=stem).state_dict()
    entries = packages.renamed(state, packages.NAMES[source])
    found = recognise(entries, "file")
    assert found.name == source.removesuffix(" b")
    renamed = found.rename(entries, "file")
    assert not renamed.unknown
    assert renamed.weights.keys() == ours.keys()
    expected = packages.renamed(state, packages.SEMSEG)
    for name, value in renamed.weights.items():
        assert value is expected[name]
        assert value.shape == ours[name].shape


def test_folder_and_command(tmp_path: Path) -> None:
    """convert -> a folder -> predict, with the folder's normalisation."""
    small(tmp_path)
    out = tmp_path / "model"
    names = tmp_path / "names.txt"
    names.write_text("sky\nroad\ntree\n")
    arguments = ("convert", tmp_path / WEIGHTS, "--from", "semseg", "--out", out, "--names", names)
    result = run(*arguments, "--mean", "0.5,0.5,0.5", "--no-align-corners")
    assert result.exit_code == 0, result.output
    assert "assumed: dilation=full" in result.output
    assert "known: align_corners=False, as was asked for" in result.output
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((out / "config.json").read_text())
    assert (config["classes"], config["class_names"]) == (3, ["sky", "road", "tree"])
    assert config["model"]["align_corners"] is False
    assert config["image"] == {"color_order": "RGB", "scale": 1 / 255, "mean": [0.5] * 3, "std": [0.229, 0.224, 0.225]}
    assert "dilation=full" in config["source"]["assumed"][0]
    card = (out / "README.md").read_text()
    for part in ("library_name: pspnet_fast", "hszhao/semseg", "dilation=full", "0 sky, 1 road, 2 tree"):
        assert part in card
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert_one_line(run(*arguments), 2, "holds config.json, model.safetensors, README.md already", "--overwrite")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert run(*arguments, "--overwrite").exit_code == 0

    from PIL import Image

    from pspnet_fast import Predictor

    pixels = np.random.default_rng(0).integers(0, 256, (33, 41, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    with pytest.warns(UserWarning, match="names no colors"):
        predictor = Predictor.from_checkpoint(out)
    model = PSPNet.from_pretrained(out)
    result = run("predict", tmp_path / "photo.png", "--checkpoint", out, "--out", tmp_path / "labels", "--labels")
    assert result.exit_code == 0, result.output
    assert (predictor(pixels) == np.asarray(Image.open(tmp_path / "labels" / "photo.png"))).all()
    assert predictor.class_names == ["sky", "road", "tree"]
    assert predictor.mean == json.loads((out / "config.json").read_text())["image"]["mean"]
    assert model.metadata["class_names"] == predictor.class_names
    assert not model.training


def test_another_number_of_classes(tmp_path: Path) -> None:
    state = small(tmp_path)
    model, report = convert(tmp_path / WEIGHTS, classes=4)
    random = ["cls.4.weight", "cls.4.bias", "aux.4.weight", "aux.4.bias"]
    assert sorted(report.reinitialised) == sorted(random)
    assert "3 classes became 4: the classifiers" in str(report)
    for name, value in model.state_dict().items():
        assert name in random or torch.equal(value, state[name])
    assert "the classifiers are random" in model.metadata["untrained"]
    with pytest.raises(ValueError, match="class_names must be 4, one a class, got 3"):
        convert(tmp_path / WEIGHTS, classes=4, class_names=["a", "b", "c"])


def test_backbone_alone(tmp_path: Path) -> None:
    names = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
    state = {
        f"{names[name.split('.')[1]]}.{name.split('.')[2]}" if name.startswith("layer0") else name: value
        for name, value in small(tmp_path).items()
        if name.startswith("layer")
    }
    path = tmp_path / "resnet18_v2.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    with pytest.raises(ValueError, match="is a backbone without a head; name the number of classes"):
        convert(path)
    model, report = convert(path, "semseg", class_names=list("abcdefg"))
    assert model.classes == 7
    assert "WARNING: the file holds a backbone alone: pyramid and classifier are random" in str(report)
    assert torch.equal(model.layer0[0].weight, state["conv1.weight"])  # type: ignore[index]
    assert {name.partition(".")[0] for name in report.missing} == {"ppm", "cls", "aux"}
    model.save_pretrained(tmp_path / "start")
    from pspnet_fast import Predictor

    with pytest.warns(UserWarning, match="the model is not trained: pyramid and classifier are random"):
        Predictor.from_checkpoint(tmp_path / "start")
    assert "**Not trained:" in (tmp_path / "start" / "README.md").read_text()


@torch.no_grad()
def test_one_output_becomes_two_classes(tmp_path: Path) -> None:
    """Whose greater one is what a sigmoid above 0.5 is; argmax over one output would call every pixel 0."""
    torch.manual_seed(1)
    one = PSPNet(1, "resnet18").eval()
    torch.save({"state_dict": {f"model.{name}": value for name, value in one.state_dict().items()}}, tmp_path / "w.pth")
    two, report = convert(tmp_path / "w.pth", class_names=["ground", "tree"])
    image = torch.randn(IMAGE)
    z, logits = one(image)["out"], two(image)["out"]
    torch.testing.assert_close(logits.softmax(1)[:, 1:], z.sigmoid())
    assert "one output, taken as that of a sigmoid, became two classes" in str(report)
    assert "random" not in str(report)


def test_entries_that_no_model_has(tmp_path: Path) -> None:
    state = small(tmp_path)
    torch.save({**state, "module.cls.4.bias": state["cls.4.bias"]}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"two entries are cls.4.bias but for what stands before it"):
        convert(tmp_path / "w.pth")


def test_bgr(tmp_path: Path) -> None:
    small(tmp_path)
    rgb = convert(tmp_path / WEIGHTS).model
    bgr, report = convert(tmp_path / WEIGHTS, bgr=True, mean=(0.1, 0.2, 0.3))
    image = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        torch.testing.assert_close(bgr(image)["out"], rgb(image.flip(1))["out"], rtol=1e-4, atol=1e-4)
    assert bgr.metadata["mean"] == [0.3, 0.2, 0.1]
    assert "was turned to take RGB" in str(report)


CFG = """align_corners=True, strides=(
    1, 2, 2, 2,
), dilations=(1, 1, 1, 1), contract_dilation=True, pool_scales=(1, 3)"""


def test_what_mmsegmentation_says_of_itself(tmp_path: Path) -> None:
    from pspnet_fast.convert.mmseg import read_meta

    data = {"classes": ("a", "b"), "palette": [[1, 2, 3], [4, 5, 6]]}
    arguments, classes = read_meta({"meta": {"cfg": CFG, "dataset_meta": data}})
    assert arguments == {"align_corners": True, "output_stride": 32, "dilation": "contracted", "bins": [1, 3]}
    assert classes == {"class_names": ["a", "b"], "colors": [[1, 2, 3], [4, 5, 6]]}
    assert read_meta({"meta": {"CLASSES": ("a",), "PALETTE": None}}) == ({}, {"class_names": ["a"]})
    assert read_meta({"meta": 3}) == read_meta({}) == ({}, {})


def test_own_checkpoint(tmp_path: Path) -> None:
    from pspnet_fast.training.checkpoint import save_checkpoint

    arguments = {"backbone": "resnet18", "stem": "conv7", "bins": [1, 2], "head_channels": 8, "align_corners": False}
    model = PSPNet(3, **arguments)  # type: ignore[arg-type]
    metadata = {"model": arguments, "colors": [[1, 2, 3]] * 3, "mean": [0.4] * 3, "std": [0.2] * 3}
    state = {"model": model.state_dict(), "class_names": ["a", "b", "c"], "metadata": metadata, "config": {}}
    save_checkpoint(tmp_path / "best.pt", {**state, "step": 1, "steps": 1, "history": []})
    converted, report = convert(tmp_path / "best.pt")
    converted.save_pretrained(tmp_path / "model")
    again, _ = convert(tmp_path / "model", "pspnet_fast")
    for one in (converted, again, PSPNet.from_pretrained(tmp_path / "model")):
        assert one.config == {**model.config, **arguments}  # type: ignore[dict-item]
        assert all(torch.equal(value, one.state_dict()[name]) for name, value in model.state_dict().items())
        assert one.metadata["class_names"] == ["a", "b", "c"]
        assert (one.metadata["colors"], one.metadata["mean"]) == ([[1, 2, 3]] * 3, [0.4] * 3)
    assert "known: all conventions" in str(report)
    with pytest.raises(ValueError, match=r"its checkpoint tells its conventions \(dilation\)"):
        convert(tmp_path / "best.pt", dilation="full")
    more, report = convert(tmp_path / "best.pt", classes=5)
    assert more.metadata["class_names"] == [f"class {index}" for index in range(5)]
    assert "colors" not in more.metadata
    assert "3 classes became 5" in str(report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer3.1.conv2.weight": None}, r"lacks layer3.1.conv2.weight"),
        ({"cls.1.running_var": None}, r"lacks cls.1.running_var"),
        ({"layer2.0.se.weight": torch.ones(2)}, r"entries of which nothing is known: layer2.0.se.weight"),
        ({"cls.0.bias": torch.ones(2), "cls.1.running_mean": None}, r"lacks cls.1.running_mean; .*: cls.0.bias"),
        ({"layer4.0.bn1.bias": torch.ones(2)}, r"another shape: layer4.0.bn1.bias \(\(2,\) in the file, \(512,\)"),
        ({"layer4.0.bn1.bias": torch.full((512,), torch.nan)}, "layer4.0.bn1.bias: holds numbers that are not finite"),
        ({"ppm.features.3.1.weight": torch.ones(128, 512, 3, 3)}, "another shape: ppm.features.3.1.weight"),
        ({"ppm.features.0.1.weight": torch.ones(128, 500, 1, 1)}, "pools 500 channels, which no stage of resnet18 has"),
        ({"ppm.features.4.1.weight": torch.ones(128, 512, 1, 1)}, r"has 5 levels, bins are \[1, 2, 3, 6\]"),
        ({"layer0.0.weight": torch.ones(16, 3, 3, 3)}, "its stem has 3 convolutions of 16, 64, 128 channels; known"),
        ({"cls.0.weight": None}, "its head lacks cls.0.weight"),
        ({"cls.0.bias": torch.ones(2)}, "nothing is known: cls.0.bias"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    small(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / WEIGHTS)


def test_not_strict(tmp_path: Path) -> None:
    small(tmp_path, **{"layer3.1.conv2.weight": None, "extra.weight": torch.ones(1)})
    model, report = convert(tmp_path / WEIGHTS, strict=False)
    assert (report.missing, report.unknown) == (["layer3.1.conv2.weight"], ["extra.weight"])
    assert "WARNING: " in str(report)
    assert model.metadata["untrained"] == "layer3.1.conv2.weight are random"


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("pickle_ran"),))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pdparams", pickle.dumps({"w": np.ones(2)}), r"is a pickle of Paddle, .*numpy.savez\('weights.npz'"),
        (
            "model.pth",
            pickle.dumps({"state_dict": Evil()}, protocol=2),
            "holds Python objects .*, and reading them can run any code",
        ),
        ("model.npz", pickle.dumps({"w": Evil()}), r"is damaged or no .npz of plain arrays"),
        ("model.pth", b"", "is empty"),
        ("model.pth", b"PK\x03\x04 cut off", "its end is missing"),
        ("model.pth", b"<html>", "a text file that begins"),
        ("model.safetensors", b"\x00" * 20, "is damaged or no file of safetensors"),
    ],
    ids=["pdparams", "pickle", "npz", "empty", "cut", "text", "safetensors"],
)
def test_files_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / name)
    assert_one_line(run("convert", tmp_path / name, "--out", tmp_path / "model"), 1, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_names_of_nobody(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"names of no source that is known \(features.0.weight, ...\); known are"):
        convert(tmp_path / WEIGHTS)
    small(tmp_path)
    with pytest.raises(ValueError, match="has not the names of mmsegmentation, but of hszhao/semseg"):
        convert(tmp_path / WEIGHTS, "mmseg")
    result = run("convert", tmp_path / WEIGHTS, "--from", "smp", "--out", tmp_path / "model")
    assert_one_line(result, 1, "has not the names of segmentation_models_pytorch, but of hszhao/semseg")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="source must be one of auto, pspnet_fast, paddleseg"):
        convert(tmp_path / WEIGHTS, "keras")
    with pytest.raises(FileNotFoundError, match="no weights"):
        convert(tmp_path / "none.pth")


def test_basic_blocks_of_mmsegmentation_are_refused(tmp_path: Path) -> None:
    """Their second convolution is not dilated, which no shape shows."""
    names = {"layer0": "backbone.stem", **{f"layer{i}": f"backbone.layer{i}" for i in range(1, 5)}}
    head = {"ppm.features.{}.1": "decode_head.psp_modules.{}.1.conv", "cls.0": "decode_head.bottleneck.conv"}
    head |= {"ppm.features.{}.2": "decode_head.psp_modules.{}.1.bn", "cls.1": "decode_head.bottleneck.bn"}
    head |= {"cls.4": "decode_head.conv_seg"}
    state = {name: value for name, value in small(tmp_path).items() if not name.startswith("aux.")}
    save_file(packages.renamed(state, names | head), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="dilates the first convolution alone of resnet18's blocks"):
        convert(tmp_path / WEIGHTS)
    model, report = convert(tmp_path / WEIGHTS, output_stride=32)
    assert not model.config["aux"]  # type: ignore[index]
    assert "dilation" not in str(report)


def test_a_damaged_weight_in_an_archive_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(nn.Conv2d(30, 40, 3).state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not as it was written"):
        convert(path)
