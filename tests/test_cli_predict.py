"""``pspnet-fast predict`` as a user calls it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from limits import largest_file
from toy_command import Workspace, assert_one_line, run
from toy_data import COLORS, SIZE

from pspnet_fast.inference.predict import Predictor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("predict"))


def test_predict_writes_three_pictures(work: Workspace, tmp_path: Path) -> None:
    image = cv2.imread(str(work.data / "val_0.png"))[:35, :41]
    cv2.imwrite(str(tmp_path / "odd.png"), image)
    result = run("predict", tmp_path / "odd.png", work.data / "val_1.png", "--checkpoint", work.checkpoint,
                 "--out", tmp_path / "labels", "--no-legend")  # fmt: skip
    assert result.exit_code == 0, result.output
    label = cv2.imread(str(tmp_path / "labels" / "odd.png"), cv2.IMREAD_UNCHANGED)
    color = cv2.imread(str(tmp_path / "labels" / "odd_color.png"))[..., ::-1]
    blended = cv2.imread(str(tmp_path / "labels" / "odd_overlay.png"))
    assert label.shape == (35, 41)
    assert (color == np.asarray(COLORS)[label]).all()
    assert np.abs(2.0 * blended - image - color[..., ::-1]).max() <= 1
    assert cv2.imread(str(tmp_path / "labels" / "val_1.png"), cv2.IMREAD_UNCHANGED).shape == SIZE


def test_predict_goes_on_after_a_bad_image(work: Workspace, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    result = run("predict", bad, work.data / "val_1.png", "--checkpoint", work.checkpoint, "--out", tmp_path / "out")
    assert_one_line(result, 1, "bad.jpg: is not an image")
    assert "labelled 1 of 2" in result.output
    assert (tmp_path / "out" / "val_1.png").exists()


def test_predict_goes_on_without_what_cannot_be_used(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("big.png", "fine.png"):
        (tmp_path / name).write_bytes((work.data / "val_1.png").read_bytes())
    deep = np.random.default_rng(0).integers(4096, size=(*SIZE, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    calls = iter(
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), None, None)
    )

    def predict(self: Predictor, image: torch.Tensor) -> torch.Tensor:
        if error := next(calls):
            raise error
        return torch.zeros(image.shape[1:], dtype=torch.uint8)

    monkeypatch.setattr(Predictor, "__call__", predict)
    names = ["none.jpg", "empty", "big.png", "deep.png", "fine.png"]
    result = run("predict", *(tmp_path / name for name in names), "--checkpoint", work.checkpoint,
                 "--out", tmp_path / "out")  # fmt: skip
    assert_one_line(
        result, 1, "no image ", "none.jpg; ", "empty: no image in this folder", "big.png: out of memory; scale the"
    )
    assert f"Warning: {tmp_path / 'deep.png'}: has 16 bits and no value above 4095" in result.stderr
    assert "labelled 2 of 3 images" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{stem}{end}.png" for stem in ("deep", "fine") for end in ("", "_color", "_overlay")
    }


def test_predict_never_replaces_an_image(work: Workspace, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes((work.data / "val_1.png").read_bytes())
    for extra in ([], ["--overwrite"]):
        result = run("predict", photo, "--checkpoint", work.checkpoint, "--out", tmp_path, *extra)
        assert_one_line(result, 2, "would overwrite the image", "choose another folder for --out")
    assert photo.read_bytes() == (work.data / "val_1.png").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_predict_again(work: Workspace, tmp_path: Path) -> None:
    arguments = ("predict", work.data / "val_1.png", "--checkpoint", work.out / "best.pt", "--out", tmp_path)
    assert run(*arguments).exit_code == 0
    label = tmp_path / "val_1.png"
    label.write_bytes(b"precious")
    assert_one_line(run(*arguments), 2, "val_1.png and 2 more results exist", "--overwrite")
    assert label.read_bytes() == b"precious"
    assert run(*arguments, "--overwrite").exit_code == 0
    assert cv2.imread(str(label)) is not None


def test_predict_takes_folders(work: Workspace, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "trip/a.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes((work.data / "val_1.png").read_bytes())
    (photos / "trip" / "broken.jpg").write_bytes(b"no image")
    (photos / "trip" / "notes.txt").write_text("not looked at")
    result = run("predict", photos, "--checkpoint", work.checkpoint, "--out", tmp_path / "out")
    assert_one_line(result, 1, "broken.jpg: is not an image")
    assert "notes.txt" not in result.output
    assert "labelled 2 of 3 images" in result.output
    assert "images/s" in result.output
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    ends = (".png", "_color.png", "_overlay.png")
    assert written == {f"{stem}{end}" for stem in ("a", "trip/a") for end in ends}


def test_predict_legend(work: Workspace, tmp_path: Path) -> None:
    arguments = ("predict", work.data / "val_1.png", "--checkpoint", work.checkpoint)
    assert run(*arguments, "--out", tmp_path / "with").exit_code == 0
    assert run(*arguments, "--out", tmp_path / "without", "--no-legend").exit_code == 0
    both = (cv2.imread(str(tmp_path / name / "val_1_overlay.png"))[..., ::-1] for name in ("with", "without"))
    legend, bare = both
    assert bare.shape[:2] == SIZE
    assert legend.shape[0] > SIZE[0]
    assert (legend[: SIZE[0], : SIZE[1]] == bare).all()
    label = cv2.imread(str(tmp_path / "with" / "val_1.png"), cv2.IMREAD_UNCHANGED)
    for index, color in enumerate(COLORS):
        assert (legend[SIZE[0] :] == color).all(-1).any() == (label == index).any()


def test_predict_full_disk(work: Workspace, tmp_path: Path) -> None:
    with largest_file(100):
        result = run("predict", work.data / "val_1.png", "--checkpoint", work.checkpoint, "--out", tmp_path)
    assert_one_line(result, 1, f"{tmp_path / 'val_1'}", ".png: cannot be written: ", "MB needed", "MB free")
    assert all(cv2.imread(str(path)) is not None for path in tmp_path.iterdir())  # nothing truncated


def test_predict_missing_image_and_folder(work: Workspace, tmp_path: Path) -> None:
    result = run("predict", tmp_path / "none.jpg", "--checkpoint", work.checkpoint, "--out", tmp_path / "out")
    assert_one_line(result, 1, f"no image {tmp_path / 'none.jpg'}")
    (tmp_path / "file").write_text("")
    result = run("predict", work.data / "val_1.png", "--checkpoint", work.checkpoint, "--out", tmp_path / "file" / "x")
    assert_one_line(result, 1, str(tmp_path / "file"), "Not a directory")
    assert not (tmp_path / "out").exists()


def test_predict_interrupted(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pspnet_fast.inference.render.colorize", interrupted)
    result = run("predict", work.data / "val_1.png", "--checkpoint", work.checkpoint, "--out", tmp_path)
    assert_one_line(result, 130, "interrupted; labelled 0 of 1 images")
