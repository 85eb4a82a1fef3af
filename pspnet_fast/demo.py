"""The reason for the pyramid in one run: ``python -m pspnet_fast.demo --out runs/demo``.

Trains a small PSPNet with FusedPPM and its twin without the pyramid, a plain FCN, on the scenes "boat or car". The FCN
sees less far than the neutral mist around each hull is wide, so it can but guess which of the two it looks at.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from pspnet_fast.cli.eval_results import Results
from pspnet_fast.data.scenes import BAND, CLASSES, COLORS, MEAN, STD, SceneDataset
from pspnet_fast.inference.predict import predict_labels
from pspnet_fast.inference.render import colorize, save_png, side_by_side
from pspnet_fast.inference.sliding import Segmenter
from pspnet_fast.models import PSPNet
from pspnet_fast.models.small import SmallBackbone, reach
from pspnet_fast.report.page import write_page
from pspnet_fast.report.runs import SCORES
from pspnet_fast.training import Metrics, TrainConfig, TrainResult, evaluate, fit
from pspnet_fast.training.loading import val_loader
from pspnet_fast.training.score_files import FORMAT, scores_record
from pspnet_fast.training.scoring import score_images

SIZE = (161, 241)  # one more than a multiple of the backbone's stride, so that upsampled logits lie where they belong
BATCH = 8
BOAT, CAR = CLASSES.index("boat"), CLASSES.index("car")
MIN_IOU = 0.8  # of boat and of car, for the PSPNet
MAX_FROM_CHANCE = 0.05  # of the FCN's accuracy on boat against car, from 0.5


@dataclass(frozen=True)
class Outcome:
    """A trained model, the record of its training and its scores on the validation scenes."""

    model: PSPNet
    training: TrainResult
    metrics: Metrics

    @property
    def boat_or_car(self) -> Tensor:
        """(2, 2) int64: pixels of true boats and cars (rows) that were called boat or car (columns)."""
        return self.metrics.confusion[[BOAT, CAR]][:, [BOAT, CAR]]

    @property
    def boat_or_car_accuracy(self) -> float:
        """Share of right answers there, boats and cars counting alike: 0.5 is chance. NaN where one is never named."""
        return Metrics(self.boat_or_car).macc if self.boat_or_car.sum(1).all() else float("nan")


def make_model(seed: int, bins: tuple[int, ...] | None) -> PSPNet:
    """The demo's network; ``bins=None`` makes the FCN."""
    torch.manual_seed(seed)
    return PSPNet(len(CLASSES), SmallBackbone(), bins=bins, aux=False, head_channels=32)


def train_both(train_set: SceneDataset, val_set: SceneDataset, config: TrainConfig, out: Path) -> dict[str, Outcome]:
    """Train and score the FCN and the PSPNet under one configuration; files of the runs go to ``out/<name>``."""
    outcomes = {}
    for name, bins in (("FCN", None), ("PSPNet", (1, 2, 3, 6))):
        click.echo(f"\n{name}{'' if bins is None else f' with FusedPPM, bins {bins}'}")
        model = make_model(config.seed, bins)
        training = fit(model, train_set, val_set, config, out / name.lower(), class_names=CLASSES)
        loader = val_loader(val_set, config.val_batch_size, config.workers)
        outcomes[name] = Outcome(model, training, evaluate(model, loader, len(CLASSES), _device(model)))
    return outcomes


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """Tables of mIoU, IoU by class, and boat against car."""
    lines = ["IoU      " + "".join(f"{name:>9}" for name in ("mean", *CLASSES))]
    for name, outcome in outcomes.items():
        scores = [outcome.metrics.miou, *outcome.metrics.iou.tolist()]
        lines.append(f"{name:9}" + "".join(f"{score:9.3f}" for score in scores))
    for name, outcome in outcomes.items():
        accuracy = outcome.boat_or_car_accuracy
        lines += ["", f"{name}: boat against car, {accuracy:.1%} right (chance is 50%)", f"{'':12}says boat  says car"]
        for row, counts in zip(("boat", "car"), outcome.boat_or_car.tolist(), strict=True):
            shares = (count / max(sum(counts), 1) for count in counts)
            lines.append(
                f"  is {row:5}" + "".join(f"{share:11.1%}" for share in shares) + f"   of {sum(counts)} pixels"
            )
    return "\n".join(lines)


def failures(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What does not hold of the demo's claim, a sentence each."""
    found = []
    for index in (BOAT, CAR):
        iou = outcomes["PSPNet"].metrics.iou[index].item()
        if not iou > MIN_IOU:
            found.append(f"the PSPNet's IoU of {CLASSES[index]} is {iou:.3f}, not above {MIN_IOU}")
    accuracy = outcomes["FCN"].boat_or_car_accuracy
    if not abs(accuracy - 0.5) <= MAX_FROM_CHANCE:
        found.append(f"the FCN tells boat from car with accuracy {accuracy:.3f}, not within {MAX_FROM_CHANCE} of 0.5")
    return found


def draw_curves(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Plot loss, mIoU and the mean IoU of boat and car by epoch, both models in each, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, miou, confused = figure.subplots(1, 3)
    for (name, outcome), color in zip(outcomes.items(), ("tab:orange", "tab:blue"), strict=True):
        history = outcome.training.history
        epochs = [record["epoch"] for record in history]
        loss.plot(epochs, [record["loss"] for record in history], color=color, marker=".", label=name)
        miou.plot(epochs, [record["miou"] for record in history], color=color, marker=".", label=name)
        for index, style in ((BOAT, "-"), (CAR, "--")):
            ious = [record["iou"][index] for record in history]
            confused.plot(epochs, ious, style, color=color, marker=".", label=f"{name}, {CLASSES[index]}")
    confused.axhline(MIN_IOU, color="grey", linewidth=0.8, linestyle=":")
    loss.set(title="training loss", ylim=(0, None))
    miou.set(title="validation mIoU", ylim=(0, 1))
    confused.set(title="validation IoU of boat and car", ylim=(0, 1))
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


@torch.inference_mode()
def draw_predictions(outcomes: Mapping[str, Outcome], scenes: SceneDataset, count: int, path: Path) -> None:
    """Picture the first ``count`` scenes, their labels and what each model predicts, a row a scene, into a PNG file."""
    rows = []
    for index in range(count):
        image, label = scenes[index]
        row = [scenes.scene(index).picture, colorize(label.numpy(), COLORS)]
        for outcome in outcomes.values():
            model = outcome.model.eval()
            row.append(colorize(predict_labels(model, image[None].to(_device(model)))[0].cpu().numpy(), COLORS))
        rows.append(row)
    save_png(path, side_by_side(rows, ["image", "truth", *outcomes], CLASSES, COLORS))


class _Pixels(Dataset[tuple[Tensor, Tensor]]):
    """The scenes' pictures (H, W, 3) uint8 and labels (H, W), as an evaluation wants them."""

    def __init__(self, scenes: SceneDataset) -> None:
        self._scenes = scenes

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self._scenes.scene(index)
        return torch.from_numpy(scene.picture), torch.from_numpy(scene.label)


def save_scores(outcome: Outcome, scenes: SceneDataset, run: Path) -> None:
    """Evaluate a model into its run's folder, as `pspnet-fast eval` does: the page of the run shows it."""
    pixels: Any = _Pixels(scenes)  # of a PairDataset only length and items are used here
    segmenter = Segmenter(outcome.model.eval(), len(CLASSES), [MEAN] * 3, [STD] * 3)
    names = [f"scene {index}" for index in range(len(scenes))]
    scores = score_images(segmenter, pixels, batch_size=BATCH, calibration=True)
    record = {
        "format": FORMAT,
        "classes": list(CLASSES),
        "colors": COLORS,
        "protocol": segmenter.protocol.record(),
        "protocol_text": segmenter.protocol.describe(),
        **scores_record(scores, CLASSES, names, samples=1000),
    }
    Results((run / SCORES).parent, pixels, names, COLORS, ()).write(record, segmenter, gallery=1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="runs/demo", help="Folder to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of scenes, weights and order.")
@click.option("--epochs", type=click.IntRange(min=1), default=10)
@click.option(
    "--pairs", type=click.IntRange(min=BATCH // 2), default=128, help="Training scenes, on water and on road."
)
@click.option("--val-pairs", type=click.IntRange(min=2), default=32, help="Validation scenes, on water and on road.")
def main(out: Path, seed: int, epochs: int, pairs: int, val_pairs: int) -> None:
    """Train a PSPNet and an FCN on scenes where only the far surroundings tell a boat from a car.

    Writes curves.png, predictions.png, summary.txt, each model's run (checkpoint.pt, log.jsonl, ...) and report.html, a
    page of both runs to open in a browser, to the folder.
    Exits with 1 if the PSPNet does not tell them apart or the FCN does.
    """
    start = time.perf_counter()
    train_set, val_set = SceneDataset(SIZE, 2 * pairs, 2 * seed), SceneDataset(SIZE, 2 * val_pairs, 2 * seed + 1)
    fcn = make_model(seed, None)
    seen = reach(fcn.get_submodule(name) for name in ("layer0", "layer1", "layer2", "layer3", "layer4", "cls"))
    click.echo(f"Without the pyramid a pixel sees {seen} pixels far; the mist around each hull is {BAND} wide.")
    with tqdm(total=len(train_set) + len(val_set), desc="drawing", unit="scene", file=sys.stderr) as bar:
        for scenes in (train_set, val_set):
            for index in range(len(scenes)):
                scenes.scene(index)
                bar.update()
    # Scenes are kept in this process, so it also loads them.
    config = TrainConfig(epochs=epochs, batch_size=BATCH, val_batch_size=BATCH, lr=0.01, seed=seed, workers=0)
    outcomes = train_both(train_set, val_set, config, out)
    draw_curves(outcomes, out / "curves.png")
    draw_predictions(outcomes, val_set, 4, out / "predictions.png")
    text = summary(outcomes)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    runs = {name: out / name.lower() for name in outcomes}
    for name, outcome in outcomes.items():
        save_scores(outcome, val_set, runs[name])
    page = out / "report.html"
    write_page(list(runs.values()), page)
    click.echo(f"\n{text}\n\nWrote {out} in {time.perf_counter() - start:.0f} s. Open {page.resolve()}")
    if wrong := failures(outcomes):
        raise click.ClickException("the claim does not hold: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
