"""Folders as `pspnet-fast train` and `pspnet-fast eval` leave them, without training or evaluating anything."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ["sky", "<script>alert(1)</script>", "10 $ bills", "Bäume {{ 7 * 7 }}", "mean.[0]'\"&"]
COLORS = [[120, 170, 230], [200, 40, 40], [60, 140, 60], [230, 180, 40], [90, 90, 90]]
SIZE = (60, 80)  # of the gallery's pictures: height, width
PARTS = ("data", "forward", "backward", "optimizer")


def write_log(folder: Path, epochs: int = 4, iterations: int = 25, seed: int = 0) -> list[dict[str, Any]]:
    """A log of a training whose scores rise; one class is never seen."""
    rng = np.random.default_rng(seed)
    steps = epochs * iterations
    protocol = ["SGD, momentum 0.9", "batches of 4 images & <b>bold</b> claims"]
    config = {"lr": 0.01 * (seed + 1), "epochs": epochs, "class_weights": None, "head": ["cls", "ppm"]}
    records: list[dict[str, Any]] = [
        {
            "event": "config",
            "config": config,
            "class_names": CLASSES,
            "steps": steps,
            "protocol": protocol,
            "model": {"backbone": "resnet50", "bins": [1, 2, 3, 6]},
            "versions": {"torch": "2.13.0"},
            "machine": {"gpus": []},
        }
    ]
    for step in range(1, steps + 1):
        loss = 0.2 + 2 * (1 - step / steps) ** 2 + 0.1 * rng.random()
        records.append({"event": "iteration", "step": step, "loss": loss, "lr": 0.01 * (1 - step / steps) ** 0.9})
        if step % iterations == 0:
            iou = [*np.round(np.sort(rng.random(len(CLASSES) - 1)) * step / steps, 4).tolist(), None]
            miou = float(np.mean(iou[:-1]))
            times = dict(zip(PARTS, (0.1, 1.5, 2.5, 0.2), strict=True))
            record = {"event": "epoch", "epoch": step // iterations, "step": step, "loss": loss, "miou": miou}
            record |= {"macc": miou + 0.05, "allacc": miou + 0.1, "iou": iou, "seconds": 5.0}
            records.append({**record, "images_per_second": 4 * iterations / sum(times.values()), "times": times})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def write_scores(folder: Path, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Scores of a random confusion matrix, with a gallery of one image of each rank; the last class is absent."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 400, (len(CLASSES), len(CLASSES))) + 3000 * np.eye(len(CLASSES), dtype=int)
    counts[-1] = counts[:, -1] = 0
    hits, rows, columns = counts.diagonal(), counts.sum(1), counts.sum(0)

    def by_class(values: np.ndarray) -> dict[str, float | None]:
        known = [None if np.isnan(value) else float(value) for value in values]
        return dict(zip(CLASSES, known, strict=True))

    with np.errstate(invalid="ignore"):
        iou, accuracy, dice = hits / (rows + columns - hits), hits / rows, 2 * hits / (rows + columns)
    edges = np.linspace(0, 1, 11)
    bins = rng.integers(1, 5000, 10) * (edges[1:] > 0.2)
    middle = [float(value) if count else None for value, count in zip(edges[1:] - 0.05, bins, strict=True)]
    scores = {
        "format": 1,
        "checkpoint": "best.pt",
        "config": "toy.yaml",
        "classes": CLASSES,
        "colors": COLORS,
        "protocol": {"preset": None, "crop": [33, 33], "scales": [0.5, 1.0], "flip": True, "average": "probabilities"},
        "protocol_text": ["windows of 33x33 pixels", "the mean is over <i>classes</i> that occur"],
        "confusion": counts.tolist(),
        "miou": float(np.nanmean(iou)),
        "macc": float(np.nanmean(accuracy)),
        "allacc": float(hits.sum() / counts.sum()),
        "fwiou": 0.71234567,
        "mdice": float(np.nanmean(dice)),
        "iou": by_class(iou),
        "accuracy": by_class(accuracy),
        "dice": by_class(dice),
        "boundary_iou": None,
        "miou_interval": {"low": 0.61, "high": 0.82, "level": 0.95, "samples": 1000},
        "calibration": {
            "edges": edges.tolist(),
            "count": bins.tolist(),
            "confidence": middle,
            "accuracy": [value and value**1.2 for value in middle],
            "ece": 0.0321,
        },
        "images": [{"image": f"{index}.jpg", "miou": 0.5, "allacc": 0.6, "pixels": 4800} for index in range(7)],
        "gallery": [_entry(folder / "eval", rank, rng) for rank in ("worst", "best", "median")],
        "time": {"seconds": 3.5, "images_per_second": 2.0, "peak_memory_bytes": 1_500_000_000},
        "versions": {"pspnet_fast": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        **changes,
    }
    (folder / "eval" / "scores.json").write_text(json.dumps(scores))
    return scores


def _entry(folder: Path, rank: str, rng: np.random.Generator) -> dict[str, Any]:
    """An image of noise, blocks of class colours as truth and prediction, their differences in red."""
    (folder / "gallery").mkdir(parents=True, exist_ok=True)
    blocks = (np.ones((SIZE[0] // 4, SIZE[1] // 4), np.uint8),)
    truth, prediction = (np.kron(rng.integers(0, len(CLASSES), (4, 4)).astype(np.uint8), *blocks) for _ in range(2))
    noise = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    palette = np.asarray(COLORS, np.uint8)
    error = np.where((truth != prediction)[..., None], np.uint8([255, 0, 0]), noise.mean(2, keepdims=True)).astype("u1")
    pictures = {"image": noise, "truth": palette[truth], "prediction": palette[prediction], "error": error}
    files = {name: f"gallery/{rank}_{name}.{'jpg' if name == 'image' else 'png'}" for name in pictures}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / files[name])
    return {"rank": rank, "image": f'photos/"{rank}" <b>.jpg', "miou": 0.25, "files": files}
