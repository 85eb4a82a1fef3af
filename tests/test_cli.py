"""The commands as a user calls them, their messages and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from toy_data import COLORS, NAMES, SIZE, write_toy_data

from pspnet_fast.cli import EXTRAS, main
from pspnet_fast.training.checkpoint import load_checkpoint

CONFIG = """
model: {backbone: resnet18, stem: conv7, output_stride: 16, bins: [1, 2], head_channels: 8}
data: {crop: [33, 33], scale: [0.9, 1.1], mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
train: {epochs: 1, batch_size: 4, workers: 0, device: cpu}
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Workspace:
    """A data set, a configuration, and the run that was trained from them."""

    def __init__(self, folder: Path) -> None:
        self.data = write_toy_data(folder / "data")
        self.root = f"data.root={self.data}"
        self.config = folder / "toy.yaml"
        self.config.write_text(CONFIG)
        self.out = folder / "run"
        self.checkpoint = self.out / "checkpoint.pt"
        self.trained = run("train", self.config, self.root, "--out", self.out)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("cli"))


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """The command failed with this exit code and one line that holds all the parts."""
    assert result.exit_code == code, result.output
    error = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1
    assert "Traceback" not in result.output
    for part in parts:
        assert part in error[0]


def test_train_writes_the_run(work: Workspace) -> None:
    assert work.trained.exit_code == 0, work.trained.output
    assert "PSPNet resnet18, 3 classes" in work.trained.output
    assert "8 training and 3 validation images" in work.trained.output
    assert "best mIoU 0." in work.trained.output
    names = {path.name for path in work.out.iterdir()}
    assert names == {"checkpoint.pt", "log.jsonl", "curves.png", "tensorboard"}
    metadata = load_checkpoint(work.checkpoint)["metadata"]
    assert metadata["model"]["head_channels"] == 8
    assert metadata["mean"] == [0.5, 0.5, 0.5]


def test_print_config_shows_every_setting(work: Workspace) -> None:
    lines = run("train", work.config, "train.lr=0.5", "--print-config").stdout.splitlines()
    assert {"  lr: 0.5", "  batch_size: 4", "  momentum: 0.9", "  dilation: full"} <= set(lines)


def test_train_does_not_overwrite_a_run(work: Workspace) -> None:
    before = work.checkpoint.stat()
    result = run("train", work.config, work.root, "--out", work.out)
    assert_one_line(result, 2, "checkpoint.pt exists", "--resume", "--overwrite")
    assert work.checkpoint.stat() == before
    assert_one_line(run("train", work.config, "--resume", "--overwrite"), 2, "exclude each other")


def test_train_resumes(work: Workspace) -> None:
    result = run("train", work.config, work.root, "--out", work.out, "--resume")
    assert result.exit_code == 0, result.output
    result = run("train", work.config, work.root, "train.lr=0.5", "--out", work.out, "--resume")
    assert_one_line(result, 1, "cannot resume", "train.lr is 0.01, now 0.5")
    for change in ("model.bins=[1, 3]", "data.crop=[35,33]"):
        result = run("train", work.config, work.root, change, "--out", work.out, "--resume")
        assert_one_line(result, 1, "cannot resume")


def test_interruption_says_how_to_go_on(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pspnet_fast.training.loop.fit", interrupted)
    result = run("train", work.config, work.root, "--out", work.out, "--overwrite")
    command = f"pspnet-fast train {work.config} {work.root} --out {work.out} --resume"
    assert_one_line(result, 1, "interrupted", str(work.checkpoint), command)
    result = run("train", work.config, work.root, "--out", tmp_path / "new")
    assert_one_line(result, 1, "interrupted before the end of the first epoch")


def test_eval_prints_scores_and_draws(work: Workspace, tmp_path: Path) -> None:
    arguments = ("eval", work.config, work.root, "--checkpoint", work.checkpoint)
    result = run(*arguments, "--pictures", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[:5]] == ["class", *NAMES, "mIoU"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val_0.png", "val_2.png"]

    scores = json.loads(run(*arguments, "--json").stdout)
    history = load_checkpoint(work.checkpoint)["history"]
    assert scores["miou"] == pytest.approx(history[-1]["miou"])
    assert np.sum(scores["confusion"]) == 3 * 38 * 48
    assert list(scores["iou"]) == NAMES


def test_eval_refuses_other_classes(work: Workspace, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nviolet\n")
    result = run("eval", work.config, work.root, f"data.names={names}", "--checkpoint", work.checkpoint)
    assert_one_line(result, 1, "has the classes ['red', 'green', 'blue']", "violet")


def test_predict_writes_three_pictures(work: Workspace, tmp_path: Path) -> None:
    image = cv2.imread(str(work.data / "val_0.png"))[:35, :41]
    cv2.imwrite(str(tmp_path / "odd.png"), image)
    result = run("predict", tmp_path / "odd.png", work.data / "val_1.png", "--checkpoint", work.checkpoint,
                 "--out", tmp_path / "labels")  # fmt: skip
    assert result.exit_code == 0, result.output
    label = cv2.imread(str(tmp_path / "labels" / "odd.png"), cv2.IMREAD_UNCHANGED)
    color = cv2.imread(str(tmp_path / "labels" / "odd_color.png"))[..., ::-1]
    blended = cv2.imread(str(tmp_path / "labels" / "odd_overlay.png"))
    assert label.shape == (35, 41)
    assert (color == np.asarray(COLORS)[label]).all()
    assert np.abs(2.0 * blended - image - color[..., ::-1]).max() <= 1
    assert cv2.imread(str(tmp_path / "labels" / "val_1.png"), cv2.IMREAD_UNCHANGED).shape == SIZE


def test_predict_labels_a_photograph_as_it_is_seen(work: Workspace, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x112] = 6
    Image.open(work.data / "val_0.png").save(tmp_path / "upright.jpg", exif=turned)
    result = run("predict", tmp_path / "upright.jpg", "--checkpoint", work.checkpoint, "--out", tmp_path / "labels")
    assert result.exit_code == 0, result.output
    for suffix in ("", "_color", "_overlay"):
        assert cv2.imread(str(tmp_path / "labels" / f"upright{suffix}.png")).shape == (*SIZE[::-1], 3)


def test_predict_goes_on_after_a_bad_image(work: Workspace, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    result = run("predict", bad, work.data / "val_1.png", "--checkpoint", work.checkpoint, "--out", tmp_path / "out")
    assert_one_line(result, 1, "bad.jpg: is not an image")
    assert "labelled 1 of 2" in result.output
    assert (tmp_path / "out" / "val_1.png").exists()


def test_predict_refuses_results_of_one_name(work: Workspace, tmp_path: Path) -> None:
    twin = tmp_path / "val_1.jpg"
    twin.write_bytes((work.data / "val_1.png").read_bytes())
    result = run("predict", twin, work.data / "val_1.png", "--checkpoint", work.checkpoint, "--out", tmp_path)
    assert_one_line(result, 2, "several images are named val_1")


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["train.epoch=3"], 2, "unknown key 'train.epoch'; the nearest valid key is 'train.epochs'"),
        (["train.lr=quick"], 2, "train.lr"),
        (["data.root=/no/such/folder"], 1, "data.root: no folder /no/such/folder"),
        (["model.stem=deep"], 1, "stem must be one of 'deep64', 'deep32', 'conv7', got 'deep'"),
        (["data.train_list=none.txt"], 1, "none.txt: No such file or directory"),
        (["data.colors=none.txt"], 1, "none.txt: No such file or directory"),
        (["data.labels=ade"], 2, "data.labels must be one of 'index', 'from_one'"),
        (["data.names=train.txt"], 1, "has 3 colours for 8 classes"),
        (["train.batch_size=99"], 1, "batch_size = 99"),
        (["train.device=cuda:99"], 1, "device 'cuda:99' cannot be used here"),
    ],
)
def test_train_errors(work: Workspace, tmp_path: Path, overrides: list[str], code: int, message: str) -> None:
    assert_one_line(run("train", work.config, work.root, *overrides, "--out", tmp_path / "run"), code, message)


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


def test_bad_label_stops_training_with_its_name(work: Workspace, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data")
    cv2.imwrite(str(data / "train_3_label.png"), np.full(SIZE, 3, np.uint8))
    result = run("train", work.config, f"data.root={data}", "train.workers=1", "--out", tmp_path / "run")
    assert_one_line(result, 1, f"{data / 'train_3_label.png'}: label value 3", "allowed are 0..2 and 255")


def test_checkpoint_that_is_none(work: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(b"nothing")
    result = run("predict", work.data / "val_1.png", "--checkpoint", path, "--out", tmp_path / "out")
    assert_one_line(result, 1, "is damaged or no checkpoint")


def test_full_gpu_says_what_to_change(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("pspnet_fast.training.loop.fit", full)
    result = run("train", work.config, work.root, "--out", tmp_path / "run")
    assert_one_line(result, 1, "out of GPU memory", "train.batch_size")


def test_programming_errors_stay_visible(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pspnet_fast.training.loop.fit", broken)
    result = run("train", work.config, work.root, "--out", work.out / "broken")
    assert isinstance(result.exception, RuntimeError)


def test_traceback_on_request(work: Workspace) -> None:
    result = run("--traceback", "train", work.config, "data.root=/no/such/folder")
    assert isinstance(result.exception, FileNotFoundError)


def test_missing_extra_is_named(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    result = run("train", work.config, work.root, "--out", work.out / "x")
    assert_one_line(result, 1, "needs omegaconf: pip install 'pspnet_fast[train]'")


def test_import_needs_torch_and_click_only() -> None:
    hide = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r}))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"{hide}; import pspnet_fast.cli"], check=True)


@pytest.mark.parametrize("command", ["train", "eval", "predict", "info"])
def test_help_shows_examples(command: str) -> None:
    text = run(command, "--help").output
    assert f"pspnet-fast {command}" in text.partition("Usage:")[2]
    assert text.count("\n  pspnet-fast ") >= 2
    assert command in run("--help").output
