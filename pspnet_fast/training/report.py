"""What a training run tells: progress bar, ``log.jsonl``, ``curves.png``, tensorboard scalars and pictures."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pspnet_fast.files import replacing
from pspnet_fast.inference.lettering import drawable, families

LOG = "log.jsonl"
SCORES = {"miou": "mIoU", "macc": "mAcc", "allacc": "allAcc"}
QUIET = 600  # seconds between two lines where there is no progress bar


class Report:
    """Records of one run in ``out_dir``; use it as a context.

    Args:
        out_dir: an existing folder.
        header: first record of the log: configuration, class names, number of iterations, versions, machine.
        step, validated: iterations done, and done at the last validation; 0 starts new files, else the records of these
            are kept and later ones, of what was lost, dropped.
        epochs: of the whole run.
        images: training images of the whole run, for the progress bar. Where stderr is no terminal a line every
            ten minutes takes the bar's place.

    Raises:
        OSError: a file cannot be written; the message names it.
    """

    def __init__(
        self, out_dir: Path, header: Mapping[str, Any], step: int, validated: int, epochs: float, images: int
    ) -> None:
        self._curves = out_dir / "curves.png"
        self._class_names: list[str] = header["class_names"]
        self._path = out_dir / LOG
        records = [{"event": "config", **header}]
        if step and self._path.exists():
            records += [record for record in read_log(self._path)[1:] if _is_done(record, step, validated)]
        with replacing(self._path) as file:
            file.write("".join(map(_line, records)).encode())
        self._log = self._path.open("a", encoding="utf-8")

        tensorboard = out_dir / "tensorboard"
        if not step:
            for events in tensorboard.glob("events.out.tfevents.*"):
                events.unlink()
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)
        self._epochs = epochs
        self._steps: int = header["steps"]
        self._told = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=images, initial=images * step // self._steps, unit="img", desc="train", disable=not terminal
        )

        for sentence in header["protocol"]:
            self._bar.write(sentence)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        with suppress(OSError):  # what could not be written has raised already
            self._log.close()
        with suppress(OSError):
            self._tensorboard.close()

    def advance(self, images: int) -> None:
        """Move the progress bar by the images of one iteration."""
        self._bar.update(images)

    def iterations(self, first: int, lrs: Sequence[float], losses: Sequence[float]) -> None:
        """Record consecutive iterations; ``first`` is the number of the first of them, from 1."""
        steps = range(first, first + len(losses))
        self._write(
            [
                {"event": "iteration", "step": step, "loss": loss, "lr": lr}
                for step, lr, loss in zip(steps, lrs, losses, strict=True)
            ]
        )
        for step, lr, loss in zip(steps, lrs, losses, strict=True):
            self._scalars(step, {"train/loss": loss, "train/lr": lr})
        self._bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{lrs[-1]:.2g}", refresh=False)
        if self._bar.disable and time.monotonic() - self._told >= QUIET:
            self._told = time.monotonic()
            print(f"iteration {steps[-1]} of {self._steps}: loss {losses[-1]:.4f}, lr {lrs[-1]:.2g}", flush=True)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Record a validation: what :class:`Callback` is told of it."""
        self._write([{"event": "epoch", **record}])
        scores = {f"val/{name}": record[name] for name in SCORES}
        scores |= {f"val_iou/{name}": iou for name, iou in zip(self._class_names, record["iou"], strict=True)}
        self._scalars(record["step"], {**scores, "train/images_per_second": record["images_per_second"]})
        shown = ", ".join(f"{title} {_text(record[name])}" for name, title in SCORES.items())
        self._bar.write(
            f"epoch {record['epoch']}/{self._epochs:g}: loss {record['loss']:.4f}, {shown}, "
            f"{record['images_per_second']:.1f} images/s ({_shares(record['times'])})"
        )

    def draw_curves(self) -> None:
        """Draw ``curves.png`` from the log."""
        draw_curves(read_log(self._path), self._curves)

    def pictures(self, step: int, pictures: Sequence[NDArray[np.uint8]]) -> None:
        """Show pictures (H, W, 3) of the first validation images in tensorboard: image, truth, prediction."""
        with self._telling_tensorboard():
            for number, picture in enumerate(pictures, 1):
                self._tensorboard.add_image(f"val/image {number}", picture, step, dataformats="HWC")

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._log.write("".join(map(_line, records)))
            self._log.flush()
        except OSError as error:
            raise OSError(error.errno, f"cannot be written: {error.strerror}", str(self._path)) from None

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        with self._telling_tensorboard():
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(name, value, step)

    @contextmanager
    def _telling_tensorboard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of its writing thread
            folder = str(self._path.with_name("tensorboard"))
            raise OSError(error.errno, f"cannot be written: {error.strerror}", folder) from None


def _is_done(record: Mapping[str, Any], step: int, validated: int) -> bool:
    return record["step"] <= (validated if record["event"] == "epoch" else step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a ``log.jsonl``: first the configuration, then iterations and epochs as they happened.

    A last line that a crash has cut off is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
    for name, title in SCORES.items():
        score_axes.plot(at, [_number(record[name]) for record in epochs], marker=".", label=title)
    score_axes.set(title="validation", xlabel="epoch", ylim=(0, 1))
    score_axes.legend()
    names = [drawable(name) for name in records[0]["class_names"]]
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
            label=f"{values[-1]:.2f} {names[index]}".replace("$", r"\$"),  # else it is a formula
        )
    title = "validation IoU by class" if shown == order else "validation IoU, ten best and ten worst classes"
    class_axes.set(title=title, xlabel="epoch", ylim=(0, 1))
    font = {"family": families(names), "size": "small"}
    class_axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), prop=font)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, up to ``window`` in all."""
    means, total = [], 0.0
    for place, value in enumerate(values):
        total += value - (values[place - window] if place >= window else 0.0)
        means.append(total / min(place + 1, window))
    return means


def _shares(times: Mapping[str, float]) -> str:
    total = max(sum(times.values()), 1e-9)
    return ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in times.items())


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _line(record: Mapping[str, Any]) -> str:
    """One line of valid JSON: numbers that are not finite become null, what JSON does not know its text."""
    return json.dumps(_finite(record), allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
