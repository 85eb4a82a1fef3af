"""Data sets of every kind through the commands."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from toy_command import Workspace, assert_one_line, run
from toy_data import NAMES, SIZE, write_toy_data

from pspnet_fast.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("data"))


def test_train_says_what_looks_wrong_in_the_data(work: Workspace, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data")
    (data / "val.txt").write_text((data / "train.txt").read_text())
    (data / "colors.txt").unlink()
    out = tmp_path / "run"
    result = run("train", work.config, f"data.root={data}", "data.mean=[124,116,104]", "--out", out)
    assert result.exit_code == 0, result.output
    assert "colors.txt: the classes get colours that differ well" in result.stderr
    assert "Warning: data.mean=[124,116,104] looks like values for 0..255" in result.stderr
    assert "Warning: 8 images stand in" in result.stderr
    colors = load_checkpoint(out / "checkpoint.pt")["metadata"]["colors"]
    assert len({tuple(color) for color in colors}) == len(NAMES)


def test_masks_of_0_and_255_want_a_remap(work: Workspace, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data")
    (data / "names.txt").write_text("background\nvessel\n")
    (data / "colors.txt").unlink()
    mask = np.zeros(SIZE, np.uint8)
    mask[:, 20:] = 255
    for path in data.glob("*_label.png"):
        cv2.imwrite(str(path), mask)
    arguments = ("train", work.config, f"data.root={data}", "--out", tmp_path / "run")
    assert_one_line(run(*arguments), 1, "0 and 255 only", '"data.remap={0: 0, 255: 1}"')
    result = run(*arguments, "data.remap={0: 0, 255: 1}")
    assert result.exit_code == 0, result.output
    assert_one_line(run(*arguments, "data.remap={0: 1, 255: 0}", "--resume"), 1, "cannot resume", "remap")
    scores = run("eval", *arguments[1:3], "data.remap={0: 0, 255: 1}", "--json",
                 "--checkpoint", tmp_path / "run" / "checkpoint.pt")  # fmt: skip
    assert np.sum(json.loads(scores.stdout)["confusion"], 1).tolist() == [3 * 40 * 20, 3 * 40 * 28]


def test_class_without_a_pixel_is_named(work: Workspace, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data")
    for path in data.glob("*_label.png"):
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(label == 2, 255, label))
    arguments = (work.config, f"data.root={data}")
    result = run("train", *arguments, "train.batch_size=99", "--out", tmp_path / "run")
    for split in ("train", "val"):
        assert f"Warning: {data / split}.txt: no pixel is of class 2 (blue) in its labels; 255 is" in result.stderr
    assert '"data.remap={0: 0, 1: 1, 255: 2}"' in result.stderr
    result = run("eval", *arguments, "--checkpoint", work.checkpoint, "--json")
    assert f"Warning: {data / 'val.txt'}: no pixel is of class 2 (blue)" in result.stderr
    scores = json.loads(result.stdout, parse_constant=pytest.fail)
    assert scores["accuracy"]["blue"] is None
    for path in data.glob("*_label.png"):
        cv2.imwrite(str(path), np.resize(np.uint8([0, 255]), SIZE))
    assert_one_line(run("eval", *arguments, "--checkpoint", work.checkpoint), 1, "val.txt: ", "0 and 255 only")


def test_home_and_variables_in_names(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(work.data.parent))
    monkeypatch.setenv("SPLITS", str(work.data))
    monkeypatch.delenv("NOWHERE", raising=False)
    checkpoint = "--checkpoint=~/run/checkpoint.pt"
    files = ["data.val_list=${SPLITS}/val.txt", "data.names=$SPLITS/names.txt", "data.colors=~/data/colors.txt"]
    for root in ("~/data", "$HOME/data"):
        result = run("eval", "~/toy.yaml", f"data.root={root}", *files, checkpoint)
        assert result.exit_code == 0, result.output
    result = run("predict", "~/data/val_0.png", checkpoint, "--out=~/labels")
    assert result.exit_code == 0, result.output
    assert (work.data.parent / "labels" / "val_0.png").exists()
    message = "data.root=${NOWHERE}/x: the environment variable NOWHERE is not set"
    assert_one_line(run("train", work.config, "data.root=${NOWHERE}/x"), 1, message)
    (tmp_path / "~ $NOWHERE").symlink_to(work.data)  # a name that is there is taken as it is
    monkeypatch.chdir(tmp_path)
    assert run("eval", work.config, "data.root=~ $NOWHERE", checkpoint).exit_code == 0


def test_label_conventions(work: Workspace, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data")
    for path in data.glob("*_label.png"):
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(label == 255, 0, label + 1))
    arguments = ("train", work.config, f"data.root={data}", "--out", tmp_path / "run")
    assert_one_line(run(*arguments), 1, "_label.png: label value 3", "data.labels=from_one")
    assert_one_line(run(*arguments, "data.labels=ade20k"), 1, "data.labels=ade20k has 150 classes")
    result = run(*arguments, "data.labels=from_one")
    assert result.exit_code == 0, result.output


def test_predict_labels_a_photograph_as_it_is_seen(work: Workspace, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x112] = 6
    Image.open(work.data / "val_0.png").save(tmp_path / "upright.jpg", exif=turned)
    result = run("predict", tmp_path / "upright.jpg", "--checkpoint", work.checkpoint, "--out", tmp_path / "labels")
    assert result.exit_code == 0, result.output
    for suffix in ("", "_color"):
        assert cv2.imread(str(tmp_path / "labels" / f"upright{suffix}.png")).shape == (*SIZE[::-1], 3)
