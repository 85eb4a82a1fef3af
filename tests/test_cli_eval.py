"""``pspnet-fast eval`` and ``eval-compare`` as a user calls them: protocols, files and refusals."""

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from toy_command import assert_one_line, run
from toy_data import COLORS, NAMES, SIZE, write_toy_data

from pspnet_fast.inference.protocol import Protocol
from pspnet_fast.inference.sliding import Segmenter
from pspnet_fast.models import PSPNet
from pspnet_fast.optimization import Optimized
from pspnet_fast.training.checkpoint import KEYS, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = ("--protocol", "semseg", "--crop", "25,33", "--scales", "0.75,1.25")


class Workspace:
    """A data set, a configuration, and a checkpoint of random weights, which takes less time than a trained one."""

    def __init__(self, folder: Path) -> None:
        self.data = write_toy_data(folder / "data")
        self.config, self.checkpoint = folder / "toy.yaml", folder / "checkpoint.pt"
        self.config.write_text("train: {workers: 0, device: cpu}")
        torch.manual_seed(1)
        model = PSPNet(len(NAMES), "resnet18", stem="conv7", output_stride=16, bins=(1, 2), head_channels=8, aux=False)
        metadata = {"model": model.config, "colors": COLORS, "mean": [0.5] * 3, "std": [0.25] * 3}
        state = dict.fromkeys(KEYS) | {"model": model.state_dict(), "class_names": NAMES, "metadata": metadata}
        save_checkpoint(self.checkpoint, state)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def arguments(work: Workspace) -> tuple[object, ...]:
    return ("eval", work.config, f"data.root={work.data}", "--checkpoint", work.checkpoint)


@pytest.fixture(scope="module")
def full(arguments: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an evaluation with everything, and what it printed."""
    out = tmp_path_factory.mktemp("full") / "eval"
    result = run(*arguments, *WINDOWS, "--boundary", "--calibration", "--gallery", 1, "--memory", "100G",
                 "--save", "labels,colors,overlays", "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, result.output


def read(out: Path) -> dict:
    return json.loads((out / "scores.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def test_files_of_an_evaluation(full: tuple[Path, str]) -> None:
    out, printed = full
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.parent != out / "gallery"}
    saved = {f"{kind}/val_{index}.png" for kind in ("labels", "colors", "overlays") for index in range(3)}
    assert names == {"scores.json", "classes.csv", "images.csv", "confusion.png", *saved}
    for part in ("protocol: ", "as semseg's tool/test.py", "windows of 25x33", "count as 0 in means", "boundary mIoU",
                 "ECE", "bootstrap samples", "worst images: ", "images/s", "beside the model"):  # fmt: skip
        assert part in printed


def test_the_record(full: tuple[Path, str]) -> None:
    """It holds what docs/evaluation.md promises, and its parts agree with each other and with the pictures."""
    out, _ = full
    record = read(out)
    assert record["format"] == 1
    assert (record["checkpoint"], record["config"]) == ("checkpoint.pt", "toy.yaml")
    assert (record["classes"], record["colors"]) == (NAMES, [list(color) for color in COLORS])
    expected = Protocol.of("semseg", crop=(25, 33), scales=(0.75, 1.25))
    assert Protocol.from_record(record["protocol"]) == expected
    assert record["protocol_text"] == expected.describe()
    confusion = np.asarray(record["confusion"])
    assert confusion.sum() == 3 * 38 * 48
    counted = np.zeros((3, 3), int)
    for index, image in enumerate(record["images"]):
        label = cv2.imread(str(out / "labels" / f"val_{index}.png"), cv2.IMREAD_UNCHANGED)
        assert label.shape == SIZE
        assert image["image"] == f"val_{index}.png"
        assert image["pixels"] == 38 * 48
        color = cv2.imread(str(out / "colors" / f"val_{index}.png"))[..., ::-1]
        assert (color == np.asarray(COLORS)[label]).all()
        counted += np.bincount(label.flat, minlength=3)
    assert counted[0].sum() == 3 * 40 * 48
    hits = np.diag(confusion)
    for index, name in enumerate(NAMES):
        assert record["accuracy"][name] == pytest.approx(hits[index] / confusion[index].sum())
        union = confusion[index].sum() + confusion[:, index].sum() - hits[index]
        assert record["iou"][name] == pytest.approx(hits[index] / union)
    assert record["miou"] == pytest.approx(np.mean(list(record["iou"].values())))
    assert record["allacc"] == pytest.approx(hits.sum() / confusion.sum())
    interval = record["miou_interval"]
    assert interval["low"] <= interval["high"]
    assert (interval["level"], interval["samples"]) == (0.95, 1000)
    assert sum(record["calibration"]["count"]) == confusion.sum()
    assert set(record["boundary_iou"]) == set(NAMES)
    assert record["time"]["images_per_second"] > 0
    assert record["versions"]["torch"] == torch.__version__


def test_optimized_or_not(arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By default on a CPU, but not under autocast; the pixels that are counted are the same."""
    used: list[type] = []
    own = Segmenter.maps
    monkeypatch.setattr(Segmenter, "maps", lambda self, *args: used.append(type(self.model)) or own(self, *args))
    scores = []
    for options, kind in (((), Optimized), (("--no-optimize",), PSPNet), (("train.bf16=true",), PSPNet)):
        used.clear()
        result = run(*arguments, "--json", *options)
        assert result.exit_code == 0, result.output
        assert set(used) == {kind}
        scores.append(json.loads(result.stdout)["confusion"])
    assert scores[0] == scores[1]


def test_tables(full: tuple[Path, str]) -> None:
    out, _ = full
    record = read(out)
    with (out / "classes.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes] == NAMES
    assert [float(row["iou"]) for row in classes] == list(record["iou"].values())
    assert sum(int(row["labelled"]) for row in classes) == np.sum(record["confusion"])
    with (out / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    assert [float(row["miou"]) for row in images] == [image["miou"] for image in record["images"]]


def test_gallery(full: tuple[Path, str], work: Workspace) -> None:
    """The best, the median and the worst image, the wrong pixels red."""
    out, _ = full
    record = read(out)
    order = sorted(record["images"], key=lambda image: -image["miou"])
    assert [entry["rank"] for entry in record["gallery"]] == ["best", "median", "worst"]
    assert [entry["image"] for entry in record["gallery"]] == [image["image"] for image in order]
    assert len(list((out / "gallery").iterdir())) == 12
    for entry in record["gallery"]:
        pictures = {kind: cv2.imread(str(out / name)) for kind, name in entry["files"].items()}
        assert {picture.shape for picture in pictures.values()} == {(*SIZE, 3)}
        label = cv2.imread(str(work.data / entry["image"].replace(".png", "_label.png")), cv2.IMREAD_UNCHANGED)
        found = cv2.imread(str(out / "labels" / entry["image"]), cv2.IMREAD_UNCHANGED)
        assert (pictures["truth"][label < 255][:, ::-1] == np.asarray(COLORS)[label[label < 255]]).all()
        assert (pictures["prediction"][..., ::-1] == np.asarray(COLORS)[found]).all()
        error = pictures["error"].astype(int)
        red = error[..., 2] > error[..., 1] + 50
        assert (red == ((label != found) & (label != 255))).all()
        assert error[label == 255].max() <= 90


def test_nothing_is_written_without_a_folder_nor_over_results(
    arguments: tuple[object, ...], work: Workspace, full: tuple[Path, str], tmp_path: Path
) -> None:
    assert_one_line(run(*arguments, "--save", "labels"), 2, "name a folder with --out")
    out = tmp_path / "eval"
    shutil.copytree(full[0], out)
    before = (out / "scores.json").read_bytes()
    assert_one_line(run(*arguments, "--out", out), 2, "scores.json and 4 more results exist", "--overwrite")
    assert (out / "scores.json").read_bytes() == before
    assert run(*arguments, "--out", out, "--overwrite").exit_code == 0
    assert read(out)["protocol"]["preset"] == "whole"
    assert list((out / "gallery").iterdir()) == []  # those of another evaluation would mislead
    image = work.data / "labels"
    image.symlink_to(work.data)  # so that labels/val_0.png is val_0.png
    try:
        result = run(*arguments, "--out", work.data, "--save", "labels", "--overwrite")
        assert_one_line(result, 2, "would overwrite the image")
    finally:
        image.unlink()


def test_json_is_all_that_is_printed(arguments: tuple[object, ...]) -> None:
    record = json.loads(run(*arguments, "--json", "--bootstrap", 0).stdout, parse_constant=pytest.fail)
    assert (record["boundary_iou"], record["calibration"], record["miou_interval"]) == (None,) * 3
    assert record["gallery"] == []
    assert record["protocol"]["absent"] == "skip"


def test_options_of_the_protocol(arguments: tuple[object, ...]) -> None:
    changes = ("--crop", 33, "--stride-rate", 0.5, "--flip", "--absent", "one", "--batch", 2)
    record = json.loads(run(*arguments, *changes, "--json").stdout)
    wanted = {"preset": None, "crop": [33, 33], "stride_rate": 0.5, "flip": True, "absent": "one"}
    assert wanted.items() <= record["protocol"].items()
    crop = run(*arguments, "data.val_crop=[33,41]")
    assert "protocol: of each image the centre of 33x41" in crop.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scales", "1,big"], "--scales': must be n[,n...], got '1,big'"),
        (["--scales", "0"], "--scales must be one or more numbers above 0, got (0.0,)"),
        (["--crop", "1,2,3"], "--crop must be (height, width), both at least 1, got (1, 2, 3)"),
        (["--base-size", "3,4"], "--base-size must be (length of the longer side,) for sizes 'long', got (3, 4)"),
        (["--memory", "lots"], "must be a size such as 4G or 500M, got 'lots'"),
        (["--save", "labels,masks"], "must be some of labels, colors, overlays, got 'masks'"),
        (["--protocol", "paddle"], "'paddle' is not one of 'whole', 'semseg', 'mmseg'"),
    ],
)
def test_options_that_are_none(arguments: tuple[object, ...], options: list[str], message: str) -> None:
    assert_one_line(run(*arguments, *options), 2, message)


def test_too_little_memory(arguments: tuple[object, ...]) -> None:
    assert_one_line(run(*arguments, "--memory", "1M"), 1, "48x40 pixels needs", "may have 1.0 MB", "windows (a crop)")


def test_compare(full: tuple[Path, str], tmp_path: Path) -> None:
    """What moved most is named first; what makes the two less comparable is said."""
    first, second = read(full[0]), read(full[0])
    second["iou"] |= {"green": first["iou"]["green"] + 0.25, "red": first["iou"]["red"] - 0.125}
    second["images"][1]["miou"] += 0.5
    second["images"][2]["miou"] -= 0.25
    second["protocol"]["flip"] = False
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(second))
    result = run("eval-compare", full[0], path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "note: the protocols differ: flip True and False"
    rows = {line.split()[0]: line.split()[-1] for line in lines if line}
    assert [line.split()[0] for line in lines[2:5]] == ["green", "red", "blue"]
    assert (rows["green"], rows["red"], rows["blue"]) == ("+0.2500", "-0.1250", "+0.0000")
    assert "2 of 3 images differ, 1 of them are better in the second" in lines
    assert [line.split()[0] for line in lines[-2:]] == ["val_1.png", "val_2.png"]
    assert "val_2.png" not in run("eval-compare", full[0], path, "--images", 1).stdout

    second["classes"] = ["x", *NAMES[1:]]
    path.write_text(json.dumps(second))
    assert_one_line(run("eval-compare", full[0], path), 1, "the classes differ")
    path.write_text(json.dumps({**first, "format": 2}))
    assert_one_line(run("eval-compare", full[0], path), 1, "has format 2, this version reads 1")
    path.write_text("{}")
    assert_one_line(run("eval-compare", path, path), 1, "is no record of `pspnet-fast eval`")
    assert_one_line(run("eval-compare", tmp_path / "none", path), 1, "none: No such file")
