"""What the folders of runs hold: the log of the training and the scores of the evaluation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pspnet_fast.training.report import LOG, read_log
from pspnet_fast.training.score_files import RANKS, read_scores

SCORES = Path("eval", "scores.json")
_KEYS = {"classes": list, "confusion": list, "iou": dict, "protocol_text": list, "images": list, "gallery": list}


@dataclass(frozen=True)
class Run:
    """A training run as its folder tells it.

    Attributes:
        name: of the page; differs from those of the other runs.
        header: the log's first record, with the configuration; empty without a log.
        iterations, epochs: the log's other records: of each iteration, and of each validation.
        scores: of ``eval/scores.json``; None without one.
    """

    name: str
    folder: Path
    header: Mapping[str, Any]
    iterations: Sequence[Mapping[str, Any]]
    epochs: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any] | None

    @property
    def class_names(self) -> list[str]:
        """By class index: of the evaluation, else of the training."""
        return list(self.scores["classes"] if self.scores else self.header["class_names"])

    @property
    def class_iou(self) -> dict[str, float | None]:
        """IoU by class name: of the evaluation, else of the last validation; empty without either."""
        if self.scores:
            return dict(self.scores["iou"])
        return dict(zip(self.class_names, self.epochs[-1]["iou"], strict=True)) if self.epochs else {}

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The first validation of the greatest mIoU; None where none has any."""
        scored = [record for record in self.epochs if record["miou"] is not None]
        return max(scored, key=lambda record: record["miou"], default=None)

    @property
    def images_per_second(self) -> float | None:
        """Of the whole training, without the validations; None before the first of them."""
        seconds = sum(map(_seconds, self.epochs))
        images = sum(record["images_per_second"] * _seconds(record) for record in self.epochs)
        return images / seconds if seconds else None

    @property
    def seconds_per_image(self) -> dict[str, float]:
        """Of each part of an iteration, mean over the training; empty before the first validation."""
        images = sum(record["images_per_second"] * _seconds(record) for record in self.epochs)
        if not images:
            return {}
        parts = dict.fromkeys(part for record in self.epochs for part in _times(record))
        return {part: sum(_times(record).get(part, 0.0) for record in self.epochs) / images for part in parts}


def _times(record: Mapping[str, Any]) -> Mapping[str, float]:
    """Seconds of each part; none in logs of before they were taken."""
    return record.get("times", {})


def _seconds(record: Mapping[str, Any]) -> float:
    return float(sum(_times(record).values()))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in these folders; one that is named twice is read once.

    Raises:
        ValueError: a folder holds neither a log nor scores, or a file in it is damaged.
        OSError: a file cannot be read.
    """
    different = list({folder.resolve(): folder for folder in folders}.values())
    return [_read(folder, name) for folder, name in zip(different, _names(different), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or with as many of the folders above as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    log, scores = folder / LOG, folder / SCORES
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; name one that `pspnet-fast train` wrote")
    if not log.exists() and not scores.exists():
        raise ValueError(f"{folder}: holds neither {LOG}, of `pspnet-fast train`, nor {SCORES}, of `pspnet-fast eval`")
    records = _read_log(log) if log.exists() else []
    header = records[0] if records else {}
    iterations, epochs = (
        [record for record in records if record["event"] == event] for event in ("iteration", "epoch")
    )
    return Run(name, folder, header, iterations, epochs, _read_scores(scores) if scores.exists() else None)


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        records = read_log(path)
        if not records or records[0]["event"] != "config":
            raise ValueError("its first record is not the configuration")
        return records
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no log of `pspnet-fast train`, or damaged: {error}") from None


def _read_scores(path: Path) -> dict[str, Any]:
    scores = read_scores(path)
    for key, kind in _KEYS.items():
        if not isinstance(scores.get(key), kind):
            raise ValueError(f"{path}: is damaged: {key} must be a {kind.__name__}, got {scores.get(key)!r:.40}")
    classes, confusion = scores["classes"], scores["confusion"]
    if any(len(row) != len(classes) for row in (confusion, *confusion)) or list(scores["iou"]) != classes:
        raise ValueError(f"{path}: is damaged: confusion and iou must be of its {len(classes)} classes")
    for entry in scores["gallery"]:
        if (
            not isinstance(entry, dict)
            or {"rank", "image", "miou", "files"} - entry.keys()
            or entry["rank"] not in RANKS
        ):
            raise ValueError(f"{path}: is damaged: gallery has an entry without rank, image, miou and files")
    return scores
