import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch
from click.testing import CliRunner

from pspnet_fast.data.scenes import CLASSES, COLORS, SceneDataset
from pspnet_fast.demo import BOAT, CAR, SIZE, Outcome, failures, main, make_model, train_both
from pspnet_fast.training import Metrics, TrainConfig, TrainResult


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outcome(confused: list[list[int]]) -> Outcome:
    """All pixels right but those of boat and car, which are counted as given."""
    confusion = torch.eye(len(CLASSES), dtype=torch.int64) * 100
    confusion[BOAT : CAR + 1, BOAT : CAR + 1] = torch.tensor(confused)
    return Outcome(make_model(0, None), TrainResult([], 0.0, Path()), Metrics(confusion))


@pytest.mark.usefixtures("one_thread")
def test_demo_writes_its_files_and_admits_that_a_tiny_run_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pspnet_fast.report.page._vega", lambda: "")  # takes seconds; nothing runs it here
    out = tmp_path / "demo"
    result = CliRunner().invoke(main, ["--out", str(out), "--epochs", "1", "--pairs", "4", "--val-pairs", "2"])
    assert result.exit_code == 1
    assert "sees 18 pixels far; the mist around each hull is 22 wide" in result.output
    assert "the claim does not hold: the PSPNet's IoU of boat is" in result.output
    for name in ("fcn", "pspnet"):
        checkpoint = torch.load(out / name / "checkpoint.pt", weights_only=True)
        assert checkpoint["class_names"] == list(CLASSES)
        assert any(key.startswith("ppm.") for key in checkpoint["model"]) is (name == "pspnet")
    summary = (out / "summary.txt").read_text()
    assert summary in result.output
    assert [line.split()[0] for line in summary.splitlines()[:3]] == ["IoU", "FCN", "PSPNet"]
    assert summary.splitlines()[0].split()[1:] == ["mean", *CLASSES]
    assert f"Open {out / 'report.html'}" in result.output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<h1>fcn, pspnet</h1>" in page
    assert page.count('<article class="compare">') == 6
    for name, row in zip(("fcn", "pspnet"), summary.splitlines()[1:3], strict=True):
        scores = json.loads((out / name / "eval" / "scores.json").read_text())
        assert [f"{score:.3f}" for score in (scores["miou"], *scores["iou"].values())] == row.split()[1:]
        ranked = {entry["rank"]: entry["miou"] for entry in scores["gallery"]}
        mious = sorted(image["miou"] for image in scores["images"])
        assert [ranked["worst"], ranked["median"], ranked["best"]] == [mious[0], mious[2], mious[3]]
    assert cv2.imread(str(out / "curves.png")).std() > 10
    predictions = cv2.imread(str(out / "predictions.png"))[..., ::-1]
    assert predictions.shape[0] > 4 * SIZE[0]
    assert predictions.shape[1] > 4 * SIZE[1]
    for color in COLORS:
        assert (predictions == color).all(-1).any()


@pytest.mark.usefixtures("one_thread")
def test_the_pyramid_tells_boat_from_car_and_the_fcn_does_not(tmp_path: Path) -> None:
    train_set, val_set = SceneDataset((145, 193), 64, 0), SceneDataset((145, 193), 16, 1)
    config = TrainConfig(epochs=6, batch_size=4, val_batch_size=8, lr=0.01, workers=0)
    outcomes = train_both(train_set, val_set, config, tmp_path)
    fcn, pspnet = outcomes["FCN"], outcomes["PSPNet"]
    assert fcn.boat_or_car.sum() > 1000  # it does find hulls
    assert fcn.boat_or_car_accuracy == pytest.approx(0.5, abs=0.01)
    assert pspnet.boat_or_car_accuracy > 0.85
    assert (pspnet.metrics.iou - fcn.metrics.iou)[[BOAT, CAR]].mean() > 0.25


def test_boat_against_car() -> None:
    assert outcome([[60, 20], [30, 10]]).boat_or_car.tolist() == [[60, 20], [30, 10]]
    assert outcome([[60, 20], [30, 10]]).boat_or_car_accuracy == pytest.approx((60 / 80 + 10 / 40) / 2)
    assert torch.tensor(outcome([[0, 0], [30, 10]]).boat_or_car_accuracy).isnan()


def test_failures_name_what_does_not_hold() -> None:
    good, guess = outcome([[95, 5], [5, 95]]), outcome([[60, 40], [60, 40]])
    assert failures({"FCN": guess, "PSPNet": good}) == []
    assert failures({"FCN": good, "PSPNet": good}) == [
        "the FCN tells boat from car with accuracy 0.950, not within 0.05 of 0.5"
    ]
    assert failures({"FCN": guess, "PSPNet": guess}) == [
        "the PSPNet's IoU of boat is 0.375, not above 0.8",
        "the PSPNet's IoU of car is 0.286, not above 0.8",
    ]
    assert failures({"FCN": outcome([[0, 0], [0, 0]]), "PSPNet": good}) == [
        "the FCN tells boat from car with accuracy nan, not within 0.05 of 0.5"
    ]
