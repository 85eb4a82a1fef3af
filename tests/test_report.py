"""What the page of runs is made of, and the command that writes it; test_report_browser.py opens it."""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_command import assert_one_line, run
from toy_runs import PARTS, write_log, write_scores

from pspnet_fast.report import page
from pspnet_fast.report.charts import POINTS, charts
from pspnet_fast.report.pictures import WIDEST, data_uri
from pspnet_fast.report.runs import read_runs


@pytest.fixture(autouse=True)
def no_vega(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script takes seconds to make; here nothing runs it."""
    monkeypatch.setattr(page, "_vega", lambda: "")


def values(folders: list[Path], chart: str) -> list[dict]:
    return charts(read_runs(folders))[chart]["data"]["values"]


def test_names_tell_the_runs_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/run", "b/run", "other")]
    for folder in folders:
        write_log(folder, epochs=1)
    assert [run.name for run in read_runs(folders[1:])] == ["run", "other"]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", f"{tmp_path.name}/other"]
    assert len(read_runs([folders[0], folders[0] / "." / "../run"])) == 1


def test_long_curves_are_means(tmp_path: Path) -> None:
    records = write_log(tmp_path, epochs=3, iterations=500)
    losses = [record["loss"] for record in records if record["event"] == "iteration"]
    rows = values([tmp_path], "loss")
    assert len(rows) == 375 <= POINTS
    assert [row["iteration"] for row in rows] == list(range(4, 1501, 4))
    assert rows[7]["loss"] == pytest.approx(sum(losses[28:32]) / 4)
    assert {row["of"] for row in rows} == {4}
    assert values([tmp_path], "lr")[7]["lr"] == records[1 + 31 + 0]["lr"]
    write_log(tmp_path, epochs=2, iterations=5)
    assert [row["iteration"] for row in values([tmp_path], "loss")] == list(range(1, 11))


def test_scores_that_do_not_exist(tmp_path: Path) -> None:
    records = write_log(tmp_path, epochs=2, iterations=3)
    for record in records[1:]:
        record.update(dict.fromkeys(record.keys() & {"loss", "miou", "macc", "allacc"}))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run,) = read_runs([tmp_path])
    assert run.best is None
    assert values([tmp_path], "loss")[0]["loss"] is None
    assert "mIoU of the last validation" not in page.render([run])


def test_times_are_those_of_an_image(tmp_path: Path) -> None:
    write_log(tmp_path)  # 4.3 s for 100 images in each of 4 epochs
    (run,) = read_runs([tmp_path])
    assert run.images_per_second == pytest.approx(100 / 4.3)
    assert list(run.seconds_per_image) == list(PARTS)
    rows = {row["part"]: row for row in values([tmp_path], "times")}
    assert rows["backward"]["milliseconds"] == pytest.approx(25)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_confusion_and_calibration_are_the_evaluations(tmp_path: Path) -> None:
    scores = write_scores(tmp_path)
    scores["confusion"][0][1] = 1  # too little to be seen
    (tmp_path / "eval" / "scores.json").write_text(json.dumps(scores))
    counts = np.asarray(scores["confusion"])
    drawn = np.zeros_like(counts)
    for cell in values([tmp_path], "confusion-0"):
        drawn[cell["row"], cell["column"]] = cell["pixels"]
    assert (drawn == np.where(counts > 0.001 * counts.sum(1, keepdims=True), counts, 0)).all()
    assert 0 < (drawn != counts).sum() < 3
    bins = values([tmp_path], "calibration")
    known = scores["calibration"]
    assert [row["pixels"] for row in bins] == [count for count in known["count"] if count]
    assert [row["accuracy"] for row in bins] == [value for value in known["accuracy"] if value is not None]
    everywhere = values([tmp_path], "confidence")
    assert [row["low"] for row in everywhere] == known["edges"][:-1]
    assert math.fsum(row["share"] for row in everywhere) == pytest.approx(1)


def test_the_page_shows_what_there_is(tmp_path: Path) -> None:
    for name, writers in {"log": [write_log], "eval": [write_scores], "both": [write_log, write_scores]}.items():
        for write in writers:
            write(tmp_path / name)
    html = page.render(read_runs([tmp_path / "log"]))
    command = f"pspnet-fast eval CONFIG --checkpoint {tmp_path}/log/best.pt --out {tmp_path}/log/eval"
    assert f"{command} --calibration --gallery 3" in html
    for section in ("confusion", "calibration", "gallery"):
        assert f'<section id="{section}">' not in html
    assert 'data-chart="scores"' in html
    html = page.render(read_runs([tmp_path / "eval"]))
    assert f"pspnet-fast train CONFIG --out {tmp_path}/eval" in html
    assert '<section id="training">' not in html
    assert 'data-chart="confusion-0"' in html
    html = page.render(read_runs([tmp_path / "both"]))
    assert "class=&#34;hint" not in html
    assert "come with" not in html
    assert "<script>alert" not in html
    assert "<b>bold" not in html


def test_configuration_and_versions(tmp_path: Path) -> None:
    write_log(tmp_path / "a")
    write_log(tmp_path / "b", seed=1)
    write_scores(tmp_path / "b")
    html = page.render(read_runs([tmp_path / "a", tmp_path / "b"]))

    def row(title: str, *texts: str) -> str:
        return f'><th scope="row">{title}</th>' + "".join(f"<td>{text}</td>" for text in texts) + "</tr>"

    assert '<tr class="differs"' + row("train.lr", "0.01", "0.02") in html
    for same in (
        row("train.epochs", "4", "4"),
        row("model.bins", "[1, 2, 3, 6]", "[1, 2, 3, 6]"),
        row("eval.scales", "-", "[0.5, 1.0]"),
        row("training.gpus", "[]", "[]"),
        row("evaluation.python", "-", "3.11.2"),
    ):
        assert "<tr" + same in html


def test_large_pictures_become_small_ones(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 2 * WIDEST, 3)).astype(np.uint8)
    flat = np.asarray([[10, 200, 30], [255, 0, 9]], np.uint8)[(noise[..., 0] > 99).astype(int)]
    for name, array in (("noise.png", noise), ("flat.png", flat)):
        Image.fromarray(array).save(tmp_path / name)
    shown = {}
    for name in ("noise", "flat"):
        head, _, content = data_uri(tmp_path / f"{name}.png").partition(";base64,")
        shown[name] = head, np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
        assert shown[name][1].shape == (150, WIDEST, 3)
    assert [head for head, _ in shown.values()] == ["data:image/jpeg", "data:image/png"]
    assert {tuple(color) for color in shown["flat"][1].reshape(-1, 3)} == {(10, 200, 30), (255, 0, 9)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"fwiou": float("nan")}, "is no JSON (NaN)"),
        ({"confusion": [[1, 2], [3, 4]]}, "is damaged: confusion and iou must be of its 5 classes"),
        ({"iou": {"sky": 0.5}}, "is damaged: confusion and iou must be of its 5 classes"),
        ({"gallery": [{"rank": "good", "image": "x", "miou": 1, "files": {}}]}, "gallery has an entry without rank"),
        ({"images": None}, "is damaged: images must be a list, got None"),
        ({"gallery": [{"rank": "best", "image": "x", "miou": 1, "files": {"image": "../../x.png"}}]}, "outside"),
        ({"gallery": [{"rank": "best", "image": "x", "miou": 1, "files": {"image": "x.png"}}]}, "cannot be shown"),
    ],
)
def test_damaged_scores(tmp_path: Path, change: dict, message: str) -> None:
    write_scores(tmp_path, **change)
    assert_one_line(run("report", tmp_path), 1, str(tmp_path / "eval"), message)
    assert not (tmp_path / "report.html").exists()


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    assert_one_line(run("report", tmp_path / "none"), 1, f"no folder {tmp_path / 'none'}")
    assert_one_line(run("report", tmp_path), 1, f"{tmp_path}: holds neither log.jsonl, ", "eval/scores.json")
    for text in ("", "{}\n", "[1]\n", "no JSON\n", '{"event": "iteration"}\n'):
        (tmp_path / "log.jsonl").write_text(text)
        assert_one_line(run("report", tmp_path), 1, "log.jsonl: is no log of `pspnet-fast train`, or damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_where_the_page_goes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_log(tmp_path / name, epochs=1)
    assert f"wrote {tmp_path / 'a' / 'report.html'}" in run("report", tmp_path / "a").output
    assert f"wrote {tmp_path / 'report.html'}" in run("report", tmp_path / "a", tmp_path / "b").output
    (tmp_path / "report.html").write_text("precious")
    assert_one_line(run("report", tmp_path / "a", tmp_path / "b"), 2, "report.html exists: replace with --overwrite")
    assert (tmp_path / "report.html").read_text() == "precious"
    assert run("report", tmp_path / "a", tmp_path / "b", "--overwrite").exit_code == 0
    assert run("report", tmp_path / "a", "--out", tmp_path / "x.html").exit_code == 0
    assert "<h1>a</h1>" in (tmp_path / "x.html").read_text()
