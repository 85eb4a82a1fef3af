"""The commands as a user calls them, their messages and exit codes."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from toy_command import Workspace, assert_one_line, run
from toy_data import NAMES, SIZE, write_toy_data

from pspnet_fast.cli import EXTRAS
from pspnet_fast.models import resnet
from pspnet_fast.training import Interrupted
from pspnet_fast.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("cli"))


def test_train_writes_the_run(work: Workspace) -> None:
    assert work.trained.exit_code == 0, work.trained.output
    assert "PSPNet resnet18, 3 classes" in work.trained.output
    assert "8 training and 3 validation images" in work.trained.output
    assert "best mIoU 0." in work.trained.output
    names = {path.name for path in work.out.iterdir()}
    assert names == {"checkpoint.pt", "best.pt", "log.jsonl", "curves.png", "tensorboard"}
    metadata = load_checkpoint(work.checkpoint)["metadata"]
    assert metadata["model"]["head_channels"] == 8
    assert metadata["mean"] == [0.5, 0.5, 0.5]
    assert metadata["data"]["crop"] == [33, 33]
    assert str(work.data) not in str(metadata)  # a folder's name is nobody else's business
    for name in ("best.pt", "checkpoint.pt"):
        assert str(work.out / name) in work.trained.output


def test_a_model_in_a_folder(work: Workspace, tmp_path: Path) -> None:
    """convert makes one of a checkpoint, and eval measures it as it does the checkpoint."""
    result = run("convert", work.checkpoint, "--out", tmp_path / "model", "--verbose")
    assert result.exit_code == 0, result.output
    assert "known: all conventions, by the checkpoint" in result.output
    assert "layer0.0.weight -> layer0.0.weight" in result.output
    scores = []
    for checkpoint in (work.checkpoint, tmp_path / "model"):
        result = run("eval", work.config, work.root, "--checkpoint", checkpoint, "--json", "--bootstrap", 0)
        assert result.exit_code == 0, result.output
        scores.append(json.loads(result.stdout))
        for key in ("checkpoint", "time"):
            del scores[-1][key]
    assert scores[0] == scores[1]


def test_pretrained_backbone(work: Workspace, tmp_path: Path) -> None:
    weights = tmp_path / "resnet18.pth"
    backbone = resnet("resnet18", stem="conv7")
    state = {
        name.replace("layer0.0.", "conv1.").replace("layer0.1.", "bn1."): value
        for name, value in backbone.state_dict().items()
    }
    torch.save({**state, "fc.bias": torch.ones(9)}, weights)
    arguments = ["train", work.config, work.root, f"model.pretrained={weights}", "--out", tmp_path / "run"]
    assert_one_line(run(*arguments, "model.stem=deep64"), 1, "one convolution of 64 channels", "model.stem=conv7")
    result = run(*arguments)
    assert "120 entries loaded (torchvision or timm layout), 1 skipped (fc.bias), 0 missing" in result.stdout
    assert "SGD, momentum 0.9, weight decay 0.0001 on all parameters" in result.stdout
    weights.unlink()
    again = run(*arguments, "--resume")  # which goes on from the checkpoint
    assert again.exit_code == 0, again.output


def test_print_config_shows_every_setting(work: Workspace) -> None:
    lines = run("train", work.config, "train.lr=0.5", "--print-config").stdout.splitlines()
    assert {"  lr: 0.5", "  batch_size: 4", "  momentum: 0.9", "  dilation: full"} <= set(lines)


def test_train_does_not_overwrite_a_run(work: Workspace) -> None:
    before = work.checkpoint.stat()
    result = run("train", work.config, work.root, "--out", work.out)
    assert_one_line(result, 2, "checkpoint.pt exists", "--resume", "--overwrite")
    assert work.checkpoint.stat() == before
    assert_one_line(run("train", work.config, "--resume", "--overwrite"), 2, "exclude each other")
    assert_one_line(run("train", work.config, "--allow", "train.lr"), 2, "--allow goes with --resume")


def test_train_resumes(work: Workspace) -> None:
    result = run("train", work.config, work.root, "--out", work.out, "--resume")
    assert result.exit_code == 0, result.output
    result = run("train", work.config, work.root, "train.lr=0.5", "data.crop=[35,33]", "--out", work.out, "--resume")
    assert_one_line(result, 1, "cannot resume", "train.lr was 0.01, now 0.5", "data.crop was [33, 33], now [35, 33]",
                    "To go on with the new values: --allow train.lr --allow data.crop")  # fmt: skip
    result = run("train", work.config, work.root, "model.bins=[1, 3]", "--out", work.out, "--resume")
    assert_one_line(result, 1, "cannot resume", "model.bins was [1, 2], now [1, 3]")


def test_more_epochs_on_request(work: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(work.out, out)
    more = ("train", work.config, work.root, "train.epochs=2", "--out", out, "--resume")
    assert_one_line(run(*more), 1, "train.epochs was 1, now 2", "--allow train.epochs")
    result = run(*more, "--allow", "train.epochs")
    assert result.exit_code == 0, result.output
    assert [record["epoch"] for record in load_checkpoint(out / "checkpoint.pt")["history"]] == [1, 2]
    assert run(*more).exit_code == 0  # from now on it is the run's own setting


def test_interruption_says_how_to_go_on(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(error: BaseException) -> None:
        def raises(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("pspnet_fast.training.loop.fit", raises)

    interrupted(KeyboardInterrupt())
    command = f"pspnet-fast train {work.config} {work.root} --out {work.out} --resume"
    result = run("train", work.config, work.root, "--out", work.out, "--overwrite")
    assert_one_line(result, 130, "interrupted at once", f"{work.checkpoint} is whole", command)
    result = run("train", work.config, work.root, "--out", tmp_path / "new")
    assert_one_line(result, 130, "interrupted at once; nothing is saved")
    interrupted(Interrupted(signal.SIGTERM))
    result = run("train", work.config, work.root, "--out", work.out, "--overwrite")
    assert_one_line(result, 143, "interrupted by SIGTERM", f"{work.checkpoint} holds the state", command)


def test_eval_prints_scores(work: Workspace) -> None:
    arguments = ("eval", work.config, work.root, "--checkpoint", work.checkpoint)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines[:6]] == ["protocol:", "class", *NAMES, "mIoU"]
    scores = json.loads(run(*arguments, "--json").stdout)
    history = load_checkpoint(work.checkpoint)["history"]
    assert scores["miou"] == pytest.approx(history[-1]["miou"])
    assert np.sum(scores["confusion"]) == 3 * 38 * 48
    assert list(scores["iou"]) == NAMES


def test_eval_refuses_other_classes(work: Workspace, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nviolet\n")
    result = run("eval", work.config, work.root, f"data.names={names}", "--checkpoint", work.checkpoint)
    assert_one_line(result, 1, "different classes: class 2 is 'blue' in the checkpoint, 'violet' in the file")
    names.write_text("red\ngreen\n")
    colors = tmp_path / "colors.txt"
    colors.write_text("1 2 3\n4 5 6\n")
    result = run("eval", work.config, work.root, f"data.names={names}", f"data.colors={colors}",
                 "--checkpoint", work.checkpoint)  # fmt: skip
    assert_one_line(result, 1, "different classes: 3 in the checkpoint, 2 in the file")


def test_lists_without_labels(work: Workspace, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data")
    for path in data.glob("val_*_label.png"):
        cv2.imwrite(str(path), np.full(SIZE, 255, np.uint8))
    arguments = (work.config, f"data.root={data}")
    with pytest.warns(UserWarning, match=r"val.txt: no pixel has a label"):
        result = run("train", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert f"no mIoU, since no pixel of {data / 'val.txt'} is labelled" in result.stdout
    assert not (tmp_path / "run" / "best.pt").exists()
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    result = run("eval", *arguments, "--checkpoint", checkpoint, "--json")
    assert f"no pixel of {data / 'val.txt'} is labelled" in result.stderr
    scores = json.loads(result.stdout, parse_constant=pytest.fail)  # NaN is no JSON
    assert (scores["miou"], scores["macc"], scores["allacc"], scores["iou"]["red"]) == (None,) * 4
    assert "mIoU -, mAcc -, allAcc -" in run("eval", *arguments, "--checkpoint", checkpoint).stdout


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["train.epoch=3"], 2, "unknown key 'train.epoch'; the nearest valid key is 'train.epochs'"),
        (["train.lr=quick"], 2, "train.lr"),
        (["data.root=/no/such/folder"], 1, "data.root: no folder /no/such/folder"),
        (["model.stem=deep"], 2, "model.stem must be one of 'deep64', 'deep32', 'conv7', got 'deep'"),
        (["data.train_list=none.txt"], 1, "none.txt: No such file or directory"),
        (["data.colors=none.txt"], 1, "none.txt: No such file or directory"),
        (["data.labels=ade"], 2, "data.labels must be one of 'auto', 'index', 'from_one'"),
        (["data.names=train.txt"], 1, "has 3 colours for 8 classes"),
        (["train.batch_size=99"], 1, "batch_size = 99"),
        (["train.class_weights=[1,2]"], 2, "train.class_weights must be one number a class, 3 in all, got 2"),
        (["train.device=cuda:99"], 1, "device 'cuda:99' cannot be used here"),
    ],
)
def test_train_errors(work: Workspace, tmp_path: Path, overrides: list[str], code: int, message: str) -> None:
    assert_one_line(run("train", work.config, work.root, *overrides, "--out", tmp_path / "run"), code, message)


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was killed by the signal Killed"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "a loading process ended unexpectedly"),
        (RuntimeError("DataLoader worker ... Bus error. ... out of shared memory"), "shared memory (/dev/shm)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out of memory"),
        (RuntimeError("pyramid_pool: out of memory: 9 bytes are wanted"), "out of memory; try a smaller train.batch"),
        (cv2.error("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OSError(28, "cannot be written: No space left on device", "c.pt"), "c.pt: cannot be written: No space left"),
    ],
)
def test_errors_of_the_machine(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pspnet_fast.training.loop.fit", fails)
    assert_one_line(run("train", work.config, work.root, "--out", tmp_path / "run"), 1, message)


def test_eval_out_of_memory(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("pspnet_fast.training.scoring.score_images", fails)
    result = run("eval", work.config, work.root, "--checkpoint", work.checkpoint)
    assert_one_line(result, 1, "out of memory; try --crop, --memory or a smaller train.val_batch_size")


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
    monkeypatch.setitem(sys.modules, "yaml", None)
    result = run("train", work.config, work.root, "--out", work.out / "x")
    assert_one_line(result, 1, "needs yaml: pip install 'pspnet_fast[train]'")


def test_import_needs_torch_and_click_only() -> None:
    hide = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r}))"
    light = "assert 'torch._dynamo' not in sys.modules"  # the compiler takes two seconds to load
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"{hide}; import pspnet_fast.cli; {light}"], check=True)


@pytest.mark.parametrize(
    "command", ["train", "eval", "eval-compare", "predict", "report", "check-data", "coco-labels", "info"]
)
def test_help_shows_examples(command: str) -> None:
    text = run(command, "--help").output
    assert f"pspnet-fast {command}" in text.partition("Usage:")[2]
    assert text.count("\n  pspnet-fast ") >= 2
    assert command in run("--help").output


def test_report_of_a_run_that_was_evaluated(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pspnet_fast.report.page._vega", lambda: "")  # takes seconds; nothing runs it here
    out = work.out / "eval"
    result = run("eval", work.config, work.root, "--checkpoint", work.out / "best.pt", "--out", out, "--calibration",
                 "--gallery", 1, "--bootstrap", 0)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"wrote {work.out / 'report.html'}" in run("report", work.out).output
    page = (work.out / "report.html").read_text(encoding="utf-8")
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert f'<th scope="row">mIoU</th><td>{scores["miou"]:.4f}</td>' in page
    assert page.count('<article class="compare">') == len(scores["gallery"]) == 3
    for shown in ("confusion-0", "calibration", "loss", "times"):
        assert f'data-chart="{shown}"' in page
    for row in ("model.backbone</th><td>resnet18", "data.crop</th><td>[33, 33]", "eval.preset</th><td>whole"):
        assert row in page
