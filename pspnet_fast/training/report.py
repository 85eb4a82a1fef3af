"""What a training run tells: progress bar, ``log.jsonl``, ``curves.png`` and tensorboard scalars."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG = "log.jsonl"


class Report:
    """Records of one run in ``out_dir``; use it as a context.

    Args:
        out_dir: an existing folder.
        header: first record of the log: configuration, class names, number of iterations.
        step: iterations already done; 0 starts new files, else the records up to ``step`` are kept and later ones,
            of an interrupted epoch, dropped.
        images: training images of the whole run, for the progress bar.
    """

    def __init__(self, out_dir: Path, header: Mapping[str, Any], step: int, images: int) -> None:
        self._curves = out_dir / "curves.png"
        self._class_names: list[str] = header["class_names"]
        self._path = out_dir / LOG
        records = [{"event": "config", **header}]
        if step:
            records += [record for record in read_log(self._path)[1:] if record["step"] <= step]
        partial = self._path.with_name(LOG + ".tmp")
        partial.write_text("".join(map(_line, records)), encoding="utf-8")
        os.replace(partial, self._path)
        self._log = self._path.open("a", encoding="utf-8")

        tensorboard = out_dir / "tensorboard"
        if not step:
            for events in tensorboard.glob("events.out.tfevents.*"):
                events.unlink()
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)
        self._epochs: int = header["config"]["epochs"]
        self._bar = tqdm(
            total=images,
            initial=images * step // header["steps"],
            unit="img",
            desc="train",
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._log.close()
        self._tensorboard.close()

    def advance(self, images: int) -> None:
        """Move the progress bar by the images of one iteration."""
        self._bar.update(images)

    def iterations(self, first: int, lrs: Sequence[float], losses: Sequence[float]) -> None:
        """Record consecutive iterations; ``first`` is the number of the first of them, from 1."""
        for step, (lr, loss) in enumerate(zip(lrs, losses, strict=True), first):
            self._write({"event": "iteration", "step": step, "loss": loss, "lr": lr})
            self._tensorboard.add_scalar("train/loss", loss, step)
            self._tensorboard.add_scalar("train/lr", lr, step)
        self._log.flush()
        self._bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{lrs[-1]:.2g}", refresh=False)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Record an epoch: epoch, step, loss, miou, macc, allacc, iou (one per class), seconds, images_per_second."""
        self._write({"event": "epoch", **record})
        self._log.flush()
        step = record["step"]
        for name in ("miou", "macc", "allacc"):
            self._tensorboard.add_scalar(f"val/{name}", record[name], step)
        for name, iou in zip(self._class_names, record["iou"], strict=True):
            self._tensorboard.add_scalar(f"val_iou/{name}", iou, step)
        self._tensorboard.add_scalar("train/images_per_second", record["images_per_second"], step)
        self._bar.write(
            f"epoch {record['epoch']}/{self._epochs}: loss {record['loss']:.4f}, mIoU {record['miou']:.4f}, "
            f"mAcc {record['macc']:.4f}, allAcc {record['allacc']:.4f}, {record['images_per_second']:.1f} images/s"
        )

    def draw_curves(self) -> None:
        """Draw ``curves.png`` from the log."""
        draw_curves(read_log(self._path), self._curves)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._log.write(_line(record))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a ``log.jsonl``: first the configuration, then iterations and epochs as they happened."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot loss and learning rate per iteration, scores and per-class IoU per epoch, into a PNG file.

    ``records`` are those of :func:`read_log`, with at least one epoch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    iterations = [record for record in records if record["event"] == "iteration"]
    epochs = [record for record in records if record["event"] == "epoch"]
    steps = [record["step"] for record in iterations]
    losses = [_number(record["loss"]) for record in iterations]
    at = [record["epoch"] for record in epochs]

    figure = Figure(figsize=(10, 7), layout="constrained")
    (loss_axes, score_axes), (lr_axes, class_axes) = figure.subplots(2, 2)
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    window = max(len(losses) // 20, 1)
    loss_axes.plot(steps, _running_mean(losses, window), color="tab:blue", label=f"mean of {window} iterations")
    loss_axes.set(title="training loss", xlabel="iteration", ylim=(0, None))
    loss_axes.legend()
    lr_axes.plot(steps, [record["lr"] for record in iterations])
    lr_axes.set(title="learning rate of the backbone", xlabel="iteration", ylim=(0, None))
    for name, title in (("allacc", "allAcc"), ("macc", "mAcc"), ("miou", "mIoU")):
        score_axes.plot(at, [_number(record[name]) for record in epochs], marker=".", label=title)
    score_axes.set(title="validation", xlabel="epoch", ylim=(0, 1))
    score_axes.legend()
    names = records[0]["class_names"]
    order = sorted(range(len(names)), key=lambda index: epochs[-1]["iou"][index] or 0.0, reverse=True)
    shown = order if len(order) <= 20 else order[:10] + order[-10:]
    for place, index in enumerate(shown):
        values = [_number(record["iou"][index]) for record in epochs]
        class_axes.plot(
            at,
            values,
            marker=".",
            color=f"C{place % 10}",
            linestyle="-" if place < 10 else "--",
            label=f"{values[-1]:.2f} {names[index]}",
        )
    title = "validation IoU by class" if shown == order else "validation IoU, ten best and ten worst classes"
    class_axes.set(title=title, xlabel="epoch", ylim=(0, 1))
    class_axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    FigureCanvasAgg(figure).print_png(str(path))


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, up to ``window`` in all."""
    means, total = [], 0.0
    for place, value in enumerate(values):
        total += value - (values[place - window] if place >= window else 0.0)
        means.append(total / min(place + 1, window))
    return means


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _line(record: Mapping[str, Any]) -> str:
    """One line of valid JSON: numbers that are not finite become null."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value
