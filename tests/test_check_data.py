"""``pspnet-fast check-data``: what it counts, what it finds wrong, what it suggests, and its exit status."""

import csv
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from published_trees import TREES, write_image, write_label
from toy_command import CONFIG, assert_one_line, run
from toy_data import NAMES, SIZE, write_toy_data

from pspnet_fast.data.survey import FileReport, class_weights, suggested_crop

PIXELS = SIZE[0] * SIZE[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_toy_data(tmp_path / "data", train=4, val=2)


def check(config: Path, data: Path, *more: object) -> tuple[int, dict]:
    result = run("check-data", config, f"data.root={data}", "--json", *more)
    return result.exit_code, json.loads(result.stdout)


def test_counts(config: Path, data: Path) -> None:
    code, report = check(config, data)
    labels = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in sorted(data.glob("train_*_label.png"))]
    expected = Counter(np.concatenate([label.ravel() for label in labels]).tolist())
    assert code == 0
    train = report["train"]
    assert train["images"] == 4
    assert train["sizes"] == [[*SIZE, 4]]
    assert train["pixels"] == {name: expected[index] for index, name in enumerate(NAMES)}
    assert train["ignored"] == expected[255] == 4 * 2 * SIZE[1]
    assert train["images_with"] == {name: sum(index in label for label in labels) for index, name in enumerate(NAMES)}
    assert (train["unknown"], train["missing"], train["unreadable"]) == ({}, 0, 0)
    assert report["val"]["images"] == 2
    assert report["errors"] == {"train": [], "val": []}
    assert report["crop"] == [33, 41]


def test_everything_that_is_wrong_is_named_at_once(config: Path, data: Path, tmp_path: Path) -> None:
    wrong = np.zeros(SIZE, np.uint8)
    wrong[0, :5], wrong[1, :2] = 9, 7
    cv2.imwrite(str(data / "train_0_label.png"), wrong)
    (data / "train_1.png").write_bytes((data / "train_1.png").read_bytes()[:300])
    cv2.imwrite(str(data / "train_2_label.png"), wrong[1:])
    with (data / "train.txt").open("a") as file:
        file.write("gone.png train_3_label.png\n")
    out = tmp_path / "report"
    code, report = check(config, data, "--out", out)
    assert code == 1
    train = report["train"]
    assert (train["images"], train["missing"], train["unreadable"]) == (4, 1, 2)
    assert train["unknown"] == {"9": 5, "7": 4}
    assert sum(train["pixels"].values()) + train["ignored"] == 2 * PIXELS - 7
    errors = report["errors"]["train"]
    assert len(errors) == 4
    for text in (
        "no file ",
        "train_1.png: ",
        "label of 48x39 pixels",
        "_0_label.png: no class: 9 (5 pixels), 7 (2 pix",
    ):
        assert sum(text in error for error in errors) == 1
    assert report["errors"]["val"] == []

    rows = list(csv.DictReader((out / "files.csv").open()))
    assert len(rows) == 1 + 4 + 2
    by_label = {Path(row["label"]).name: row for row in rows}
    assert by_label["train_0_label.png"]["unknown"] == "9: 5; 7: 2"
    assert by_label["train_0_label.png"]["red"] == str(PIXELS - 7)
    assert by_label["train_1_label.png"]["height"] == ""
    assert "gone.png" in rows[0]["error"]

    text = run("check-data", config, f"data.root={data}")
    assert_one_line(text, 1, "4 problems at which training would stop; --out FOLDER and --json name all files")
    assert "train: no class: 9 (5 pixels), 7 (4 pixels)" in text.stdout
    assert "Problem (train): " in text.stdout


def test_table_and_pictures(config: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ("check-data", config, f"data.root={data}", "--out", out)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for line in ("train: 4 images; all 48x40; 5.000 % of the pixels ignored", "suggestion: data.crop=[33,41]"):
        assert line in result.stdout
    suggested = next(line for line in result.stdout.splitlines() if "class_weights" in line).partition(": ")[2]
    picture = cv2.imread(str(out / "samples.png"))
    assert picture.shape[1] > 3 * 300
    row = picture[22 : 22 + 270, 368:692].reshape(-1, 3)  # the label of the first pair, in the colours of the classes
    assert {tuple(color) for color in row.tolist()} <= {(0, 0, 255), (0, 255, 0), (255, 0, 0), (0, 0, 0)}
    assert cv2.imread(str(out / "classes.png")).std() > 5
    assert_one_line(run(*arguments), 2, "files.csv exists: replace with --overwrite")
    result = run(*arguments, "--overwrite", suggested, "--sample", 2)
    assert result.exit_code == 0, result.output
    assert "train: 2 images" in result.stdout


def test_what_may_be_wrong_is_a_warning(config: Path, data: Path) -> None:
    cv2.imwrite(str(data / "val_0_label.png"), np.full(SIZE, 255, np.uint8))
    cv2.imwrite(str(data / "val_1_label.png"), np.zeros(SIZE, np.uint8))
    code, report = check(config, data, "data.mean=[124,116,104]")
    assert code == 0
    for part in (
        "looks like values for 0..255",
        "1 labels have no pixel of a class",
        "no pixel is of classes 1 (green)",
    ):
        assert sum(part in warning for warning in report["warnings"]) == 1


def test_masks_of_0_and_255(config: Path, data: Path) -> None:
    for path in data.glob("*_label.png"):
        cv2.imwrite(str(path), np.resize(np.uint8([0, 255]), SIZE))
    code, report = check(config, data)
    assert code == 1
    assert "makes it class 1" in report["errors"]["train"][0]


def test_a_published_layout(tmp_path: Path) -> None:
    TREES["ade20k"](tmp_path)
    config = tmp_path / "ade.yaml"
    config.write_text("data: {layout: ade20k}\n")
    (tmp_path / "images/validation/ADE_val_00000001.jpg").unlink()
    (tmp_path / "annotations/training/ADE_train_00000001.png").unlink()
    write_label(tmp_path / "annotations/training/ADE_train_00000002.png", [151, 1])
    code, report = check(config, tmp_path)
    assert code == 1
    assert report["train"]["unknown"] == {"151": 96}
    assert "ADE_train_00000001.jpg: this image has no label" in report["errors"]["train"][0]
    assert any("1 labels have no image, the first is" in warning for warning in report["warnings"])


def test_colours_that_are_no_class(tmp_path: Path) -> None:
    TREES["camvid_full"](tmp_path)
    config = tmp_path / "camvid.yaml"
    config.write_text("data: {layout: camvid_full}\n")
    write_label(tmp_path / "LabeledApproved_full/0016E5_00390_L.png", np.array([(1, 2, 3), (128, 128, 128)]))
    code, report = check(config, tmp_path)
    assert code == 1
    assert report["train"]["unknown"] == {"1 2 3": 96}


def test_nothing_to_read(config: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.png")
    write_image(tmp_path / "images/val/a.png")
    (tmp_path / "names.txt").write_text("road\n")
    result = run("check-data", config, f"data.root={tmp_path}", "data.layout=folders", "--out", tmp_path / "report")
    assert_one_line(result, 1, "4 problems")
    assert not (tmp_path / "report/classes.png").exists()


def report_of(*pixels: int) -> FileReport:
    return FileReport(Path("i"), Path("l"), (1, 1), np.array([*pixels, 50]))


def test_weights_are_those_of_median_frequency_balancing() -> None:
    # frequencies: 0.3 of all 400; 0.35 of the second's 200 (and none of the first); 210 / 400
    files = [report_of(80, 0, 120, 0), report_of(40, 70, 90, 0)]
    frequency = [120 / 400, 70 / 200, 210 / 400]
    assert class_weights(files) == pytest.approx([*(0.35 / value for value in frequency), 1])
    assert class_weights([report_of(0, 0)]) == [1, 1]


def test_suggested_crop() -> None:
    assert suggested_crop(Counter({(1024, 2048): 3})) == [713, 713]
    assert suggested_crop(Counter({(360, 480): 3, (720, 960): 1})) == [353, 473]
    assert suggested_crop(Counter({(5, 17): 1})) == [9, 17]
    assert suggested_crop(Counter()) is None
