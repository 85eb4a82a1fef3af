"""``pspnet-fast predict`` as a user calls it."""

import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from limits import largest_file
from toy_command import Workspace, assert_one_line, run
from toy_data import COLORS, SIZE

from pspnet_fast.inference import memory
from pspnet_fast.inference.plan import ENDS
from pspnet_fast.inference.predict import Prediction, Predictor
from pspnet_fast.inference.protocol import Protocol
from pspnet_fast.inference.videos import VideoReader, VideoWriter
from pspnet_fast.models import PSPNet
from pspnet_fast.optimization import Optimized

BIG = 77  # the grey of an image that stands for one without room in the memory

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
    (tmp_path / "fine.png").write_bytes((work.data / "val_1.png").read_bytes())
    cv2.imwrite(str(tmp_path / "big.png"), np.full((*SIZE, 3), BIG, np.uint8))
    deep = np.random.default_rng(0).integers(4096, size=(*SIZE, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    known = Predictor.predict

    def predict(self: Predictor, images: list[np.ndarray], **options: bool) -> list[Prediction]:
        if any((image == BIG).all() for image in images):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return known(self, images, **options)

    monkeypatch.setattr(Predictor, "predict", predict)
    names = ["none.jpg", "empty", "big.png", "deep.png", "fine.png"]
    result = run("predict", *(tmp_path / name for name in names), "--checkpoint", work.checkpoint,
                 "--out", tmp_path / "out")  # fmt: skip
    assert_one_line(
        result,
        1,
        "no image ",
        "none.jpg; ",
        "empty: no image in this folder",
        "big.png: out of memory; a smaller --crop takes less",
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

    monkeypatch.setattr("pspnet_fast.inference.results.colorize", interrupted)
    result = run("predict", work.data / "val_1.png", "--checkpoint", work.checkpoint, "--out", tmp_path)
    assert_one_line(result, 130, "interrupted; labelled 0 of 1 images")


def test_predict_writes_what_is_chosen(work: Workspace, tmp_path: Path) -> None:
    image = work.data / "val_1.png"
    arguments = ("predict", image, "--checkpoint", work.checkpoint, "--out", tmp_path)
    for output, end in ENDS.items():
        before = set(tmp_path.iterdir())
        assert run(*arguments, f"--{output}").exit_code == 0
        assert set(tmp_path.iterdir()) - before == {tmp_path / f"val_1{end}"}
    predictor = Predictor.from_checkpoint(work.checkpoint, "cpu").optimized()
    prediction = predictor.predict([cv2.imread(str(image))[..., ::-1]], confidence=True, probabilities=True)[0]
    assert (cv2.imread(str(tmp_path / "val_1.png"), cv2.IMREAD_UNCHANGED) == prediction.labels).all()
    confidence = cv2.imread(str(tmp_path / "val_1_confidence.png"), cv2.IMREAD_UNCHANGED)
    assert (confidence == np.rint(255 * prediction.confidence)).all()
    probabilities = np.load(tmp_path / "val_1_probabilities.npy")
    assert probabilities.shape == (3, *SIZE)
    assert probabilities.dtype == np.float16
    assert np.abs(probabilities - prediction.probabilities).max() < 5e-4
    assert_one_line(run(*arguments, "--overlay"), 2, "val_1_overlay.png exists: replace with --overwrite")


@pytest.mark.parametrize("options", [(), ("--optimize",), ("--no-optimize",)])
def test_predict_optimized_by_default(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """The labels are the same; in windows, too."""
    used: list[type] = []
    own = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, *a, **k: used.append(type(self.model)) or own(self, *a, **k))
    image = work.data / "val_1.png"
    for number, crop in enumerate([(), ("--crop", 25)]):
        out = tmp_path / str(number)
        given = ("predict", image, "--checkpoint", work.checkpoint, "--out", out, "--labels", "--device", "cpu")
        assert run(*given, *crop, *options).exit_code == 0
        assert used.pop() is (PSPNet if "--no-optimize" in options else Optimized)
        predictor = Predictor.from_checkpoint(work.checkpoint, "cpu")
        if crop:
            predictor = replace(predictor, protocol=Protocol.of("whole", crop=(25, 25)))
        expected = own(predictor, [cv2.imread(str(image))[..., ::-1]])[0].labels
        assert (cv2.imread(str(out / "val_1.png"), cv2.IMREAD_UNCHANGED) == expected).all()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_predict_batches_images_of_one_size(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    expected, sizes = {}, []
    for index in range(5):  # two sizes, in turns
        image = cv2.imread(str(work.data / f"val_{index % 3}.png"))[: 40 - 9 * (index % 2)]
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
        expected[index] = Predictor.from_checkpoint(work.checkpoint)(tmp_path / f"{index}.png")
    known = Predictor.predict

    def predict(self: Predictor, images: list[np.ndarray], **options: bool) -> list[Prediction]:
        sizes.append(len(images))
        return known(self, images, **options)

    monkeypatch.setattr(Predictor, "predict", predict)
    result = run("predict", tmp_path, "--checkpoint", work.checkpoint, "--out", tmp_path / "out", "--labels",
                 "--batch", batch)  # fmt: skip
    assert "labelled 5 of 5 images" in result.output
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 5: [3, 2]}[batch]
    for index, label in expected.items():
        assert (cv2.imread(str(tmp_path / "out" / f"{index}.png"), cv2.IMREAD_UNCHANGED) == label).all()


def write_video(work: Workspace, path: Path, size: tuple[int, int]) -> list[np.ndarray]:
    """Three images, each for two frames, as a lossy video; returns the frames as they are read back."""
    path.parent.mkdir(exist_ok=True)
    with VideoWriter(path, 12.5) as video:
        for index in (0, 0, 1, 1, 2, 2):
            frame = cv2.imread(str(work.data / f"val_{index}.png"))[: size[0], : size[1], ::-1]
            video.write(frame)
    return list(VideoReader(path))


@pytest.mark.parametrize("size", [(40, 48), (35, 41)])
def test_predict_videos(work: Workspace, tmp_path: Path, size: tuple[int, int]) -> None:
    frames = write_video(work, tmp_path / "in" / "drive.mp4", size)
    (tmp_path / "in" / "still.png").write_bytes((work.data / "val_1.png").read_bytes())
    out = tmp_path / "out"
    arguments = ("predict", tmp_path / "in", "--checkpoint", work.checkpoint, "--out", out)
    result = run(*arguments, "--labels", "--overlay", "--confidence", "--batch", 4)
    assert result.exit_code == 0, result.output
    assert f"labelled 1 of 1 images and 1 of 1 videos (6 frames) into {out}" in result.output
    ends = {"drive": (".mkv", "_confidence.mkv", "_overlay.mp4"), "still": (".png", "_confidence.png", "_overlay.png")}
    assert {path.name for path in out.iterdir()} == {stem + end for stem in ends for end in ends[stem]}
    predictor = Predictor.from_checkpoint(work.checkpoint, "cpu").optimized()
    predictions = predictor.predict(frames, confidence=True)
    videos = [VideoReader(out / f"drive{end}") for end in ends["drive"]]
    assert [video.rate for video in videos] == [12.5] * 3
    read = [list(video) for video in videos]
    assert [len(part) for part in read] == [6, 6, 6]
    for frame, prediction, label, certain, blended in zip(frames, predictions, *read, strict=True):
        assert (label == prediction.labels[..., None]).all()
        assert (certain == np.rint(255 * prediction.confidence).astype(np.uint8)[..., None]).all()
        expected = 0.5 * frame + 0.5 * np.asarray(COLORS)[prediction.labels]
        assert np.abs(blended - expected).mean() < 12  # MPEG-4 is not exact
    assert_one_line(run(*arguments, "--probabilities"), 2, "drive.mp4: probabilities are written of images only")
    assert_one_line(run(*arguments, "--labels"), 2, "drive.mkv and 1 more results exist")


def test_predict_goes_on_after_a_bad_video(work: Workspace, tmp_path: Path) -> None:
    write_video(work, tmp_path / "whole.mp4", SIZE)
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "bad.avi").write_bytes(content[:500])
    with VideoWriter(tmp_path / "cut.mkv", 5) as video:
        for _ in range(8):
            video.write(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8))
    content = (tmp_path / "cut.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    result = run("predict", tmp_path, "--checkpoint", work.checkpoint, "--out", tmp_path / "out", "--palette")
    assert_one_line(result, 1, "bad.avi: is not a video that OpenCV can read, or not whole")
    told = re.search(rf"Warning: {tmp_path / 'cut.mkv'}: tells of 8 frames, (\d) could be read", result.stderr)
    assert 0 < int(told[1]) < 8
    assert f"labelled 2 of 3 videos ({6 + int(told[1])} frames)" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"whole_color.mp4", "cut_color.mp4"}


def test_videos_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.mkv"
    path.write_bytes(b"precious")
    frame = np.zeros(SIZE, np.uint8)
    interrupted, incomplete = VideoWriter(path, 5), VideoWriter(path, 5)
    interrupted.write(frame)
    interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    incomplete.write(frame)
    incomplete._frames = 7  # as if OpenCV had lost six
    with pytest.raises(OSError, match="cannot be written: 1 of 7 frames are there") as error:
        incomplete.__exit__(None, None, None)
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["x.mkv"]


def test_predict_in_windows(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = work.data / "val_1.png"
    predictor = Predictor.from_checkpoint(work.checkpoint, "cpu")
    assert predictor.crop == (33, 33)
    expected = predictor.in_windows()(image)
    assert (expected != predictor(image)).any()
    arguments = ("predict", image, "--checkpoint", work.checkpoint, "--labels", "--out")
    assert run(*arguments, tmp_path / "chosen", "--crop", 33).exit_code == 0
    assert_one_line(run(*arguments, tmp_path / "x", "--crop", "0,5"), 2, "--crop must be (height, width)")
    known = Predictor.predict

    def predict(self: Predictor, images: list[np.ndarray], **options: bool) -> list[Prediction]:
        if self.protocol.plain:
            raise MemoryError
        return known(self, images, **options)

    monkeypatch.setattr(Predictor, "predict", predict)
    result = run(*arguments, tmp_path / "forced")
    assert result.exit_code == 0
    assert f"Warning: {image}: out of memory as a whole; in windows of 33x33 (height x width)" in result.stderr
    for out in ("chosen", "forced"):
        assert (cv2.imread(str(tmp_path / out / "val_1.png"), cv2.IMREAD_UNCHANGED) == expected).all()


def test_predict_refuses_what_will_not_fit(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is tried: where Linux has no memory left it ends the process."""
    image = work.data / "val_1.png"
    predictor = Predictor.from_checkpoint(work.checkpoint, "cpu")
    expected = predictor(image)
    left = memory.available()
    assert left is None or 0 < left < 2**50
    monkeypatch.setattr("pspnet_fast.inference.predict._SMALL", 0)
    monkeypatch.setattr(memory, "available", lambda: 10**12)
    assert (predictor(image) == expected).all()
    monkeypatch.setattr(memory, "available", lambda: 0)
    with pytest.raises(MemoryError, match=r"an image of \d+x\d+ pixels needs \S+ MB, of which .* for one whole image"):
        predictor(image)
    result = run("predict", image, "--checkpoint", work.checkpoint, "--out", tmp_path / "out", "--labels")
    assert f"Warning: {image}: out of memory as a whole; in windows of 33x33 (height x width)" in result.stderr
    assert_one_line(result, 1, f"{image}: out of memory; a smaller --crop takes less")
    assert not list((tmp_path / "out").iterdir())
