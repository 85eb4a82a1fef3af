"""What an evaluation leaves: its record as JSON, tables as CSV and text, and which images to look at."""

import csv
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pspnet_fast
from pspnet_fast.files import replacing
from pspnet_fast.training.boundary import boundary_iou
from pspnet_fast.training.calibration import calibration_record
from pspnet_fast.training.metrics import bootstrap_interval, image_ious, known
from pspnet_fast.training.scoring import Scores

FORMAT = 1
RANKS = ("best", "median", "worst")
LEVEL = 0.95  # of the bootstrap interval


def scores_record(scores: Scores, names: Sequence[str], images: Sequence[str], samples: int) -> dict[str, Any]:
    """All scores as plain data; None for what is not defined or was not asked for.

    Args:
        names: of the classes.
        images: names of the data set's images.
        samples: of the bootstrap interval; 0 leaves it out.
    """
    metrics = scores.metrics
    low, high = bootstrap_interval(scores.counts, metrics.absent, samples, LEVEL) if samples else (math.nan,) * 2
    interval = None if math.isnan(low) else {"low": low, "high": high, "level": LEVEL, "samples": samples}
    hits, pixels = scores.counts[:, 0].sum(1).double(), scores.counts[:, 1].sum(1)
    rows = zip(images, image_ious(scores.counts).tolist(), (hits / pixels).tolist(), pixels.tolist(), strict=True)
    return {
        "confusion": metrics.confusion.tolist(),
        **{name: known(getattr(metrics, name)) for name in ("miou", "macc", "allacc", "fwiou", "mdice")},
        "iou": _by_class(metrics.iou, names),
        "accuracy": _by_class(metrics.accuracy, names),
        "dice": _by_class(metrics.dice, names),
        "boundary_iou": None if scores.boundary is None else _by_class(boundary_iou(scores.boundary), names),
        "mboundary_iou": None if scores.boundary is None else known(metrics.mean(boundary_iou(scores.boundary))),
        "miou_interval": interval,
        "calibration": None if scores.calibration is None else calibration_record(scores.calibration),
        "images": [
            {"image": image, "miou": known(miou), "allacc": known(right), "pixels": count}
            for image, miou, right, count in rows
        ],
        "time": {
            "seconds": round(scores.seconds, 3),
            "images_per_second": round(len(images) / max(scores.seconds, 1e-9), 3),
            "peak_memory_bytes": scores.peak_memory,
        },
        "versions": {
            "pspnet_fast": pspnet_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _by_class(values: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    return dict(zip(names, map(known, values.tolist()), strict=True))


def ranked(record: Mapping[str, Any], count: int) -> list[tuple[str, int]]:
    """(rank, index) of the ``count`` best, median and worst images by mIoU, the best first; no image twice."""
    scores = [(image["miou"], index) for index, image in enumerate(record["images"]) if image["miou"] is not None]
    order = [index for _, index in sorted(scores, key=lambda entry: (-entry[0], entry[1]))]
    middle = max((len(order) - count) // 2, 0)
    parts = (order[:count], order[middle : middle + count], order[max(len(order) - count, 0) :])
    chosen: dict[int, str] = {}
    for rank, part in zip((RANKS[0], RANKS[2], RANKS[1]), (parts[0], parts[2], parts[1]), strict=True):
        for index in part:
            chosen.setdefault(index, rank)
    return [(chosen[index], index) for index in order if index in chosen]


def write_scores(record: Mapping[str, Any], out: Path) -> None:
    """Write classes.csv, images.csv and, last, scores.json into a folder that exists.

    Raises:
        OSError: a file cannot be written; the message names it.
    """
    columns = [name for name in ("iou", "accuracy", "dice", "boundary_iou") if record[name] is not None]
    labelled = [sum(row) for row in record["confusion"]]
    predicted = [sum(column) for column in zip(*record["confusion"], strict=True)]
    classes = [
        [name, *(record[column][name] for column in columns), *counts]
        for name, *counts in zip(record["classes"], labelled, predicted, strict=True)
    ]
    _write_csv(out / "classes.csv", ["class", *columns, "labelled", "predicted"], classes)
    fields = ("image", "miou", "allacc", "pixels")
    _write_csv(out / "images.csv", fields, [[image[field] for field in fields] for image in record["images"]])
    with replacing(out / "scores.json") as file:
        file.write((as_json(record) + "\n").encode())


def as_json(record: Mapping[str, Any]) -> str:
    """The record as text, without NaN, which is no JSON."""
    return json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def read_scores(path: Path) -> dict[str, Any]:
    """Read scores.json, or the one in a folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no record of an evaluation, or of another format.
    """
    path = path / "scores.json" if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error})") from None
    if not isinstance(record, dict) or "confusion" not in record:
        raise ValueError(f"{path}: is no record of `pspnet-fast eval`")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path}: has format {record.get('format')}, this version reads {FORMAT}")
    return record


def _refuse(constant: str) -> None:
    """NaN and infinities, which json takes by default."""
    raise ValueError(constant)


def table(record: Mapping[str, Any]) -> str:
    """IoU, accuracy, Dice and, where it was counted, boundary IoU of each class, and their means, as text."""
    columns = {"IoU": "iou", "acc": "accuracy", "Dice": "dice"}
    if record["boundary_iou"] is not None:
        columns["bound."] = "boundary_iou"
    width = max(len("class"), *map(len, record["classes"]))
    lines = [f"{'class':<{width}}" + "".join(f" {title:>6}" for title in columns)]
    for name in record["classes"]:
        lines.append(f"{name:<{width}}" + "".join(f" {text(record[key][name]):>6}" for key in columns.values()))
    means = {"mIoU": "miou", "mAcc": "macc", "allAcc": "allacc", "fwIoU": "fwiou", "mDice": "mdice"}
    parts = [f"{title} {text(record[key])}" for title, key in means.items()]
    if record["boundary_iou"] is not None:
        parts.append(f"boundary mIoU {text(record['mboundary_iou'])}")
    if record["calibration"] is not None:
        parts.append(f"ECE {text(record['calibration']['ece'])}")
    lines.append(", ".join(parts))
    if interval := record["miou_interval"]:
        lines.append(
            f"mIoU of {interval['level']:.0%} of {interval['samples']} bootstrap samples of the images: "
            f"{text(interval['low'])} to {text(interval['high'])}"
        )
    return "\n".join(lines)


def text(value: float | None) -> str:
    """A score for a table."""
    return "-" if value is None else f"{value:.4f}"


def comparison(one: Mapping[str, Any], other: Mapping[str, Any], images: int) -> str:
    """Which classes and images differ between two records, the greatest change first, as text.

    Args:
        images: how many to name, at most.

    Raises:
        ValueError: the records have different classes.
    """
    if one["classes"] != other["classes"]:
        raise ValueError(f"the classes differ: {', '.join(one['classes'])} and {', '.join(other['classes'])}")
    lines = [f"note: {difference}" for difference in _differences(one, other)]
    lines += _changes("class", [(name, one["iou"][name], other["iou"][name]) for name in one["classes"]], None)
    means = {"mIoU": "miou", "mAcc": "macc", "allAcc": "allacc", "fwIoU": "fwiou", "mDice": "mdice"}
    lines += ["", *_changes("mean", [(title, one[key], other[key]) for title, key in means.items()], None, False)]
    before = {image["image"]: image["miou"] for image in one["images"]}
    pairs = [(i["image"], before[i["image"]], i["miou"]) for i in other["images"] if i["image"] in before]
    moved = [pair for pair in pairs if pair[1] != pair[2]]
    better = sum((new or 0) > (old or 0) for _, old, new in moved)
    lines += ["", f"{len(moved)} of {len(pairs)} images differ, {better} of them are better in the second"]
    if moved and images:
        lines += _changes("image", moved, images)
    return "\n".join(lines)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What makes two records less comparable."""
    found = []
    settings = one["protocol"].keys() | other["protocol"].keys()
    changed = [name for name in sorted(settings) if one["protocol"].get(name) != other["protocol"].get(name)]
    if changed:
        shown = (f"{name} {one['protocol'].get(name)} and {other['protocol'].get(name)}" for name in changed)
        found.append(f"the protocols differ: {', '.join(shown)}")
    names = [{image["image"] for image in record["images"]} for record in (one, other)]
    if alone := names[0] ^ names[1]:
        found.append(f"{len(alone)} images are in one of the two only")
    return found


def _changes(
    title: str, entries: Sequence[tuple[str, float | None, float | None]], most: int | None, ordered: bool = True
) -> list[str]:
    """A table of scores before and after, and their change; the greatest change first if ``ordered``."""

    def change(entry: tuple[str, float | None, float | None]) -> float:
        return math.nan if entry[1] is None or entry[2] is None else entry[2] - entry[1]

    def size(entry: tuple[str, float | None, float | None]) -> float:
        return math.inf if math.isnan(change(entry)) else -abs(change(entry))

    entries = sorted(entries, key=size) if ordered else entries
    width = max(len(title), *(len(name) for name, *_ in entries[:most]))
    lines = [f"{title:<{width}}  before   after   change"]
    for entry in entries[:most]:
        moved = "-" if math.isnan(change(entry)) else f"{change(entry):+.4f}"
        lines.append(f"{entry[0]:<{width}}  {text(entry[1]):>6}  {text(entry[2]):>6}  {moved:>7}")
    return lines
