"""``pspnet-fast eval``."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pspnet_fast.cli.common import FILE, FOLDER, load_predictor, read_classes, validation_set

if TYPE_CHECKING:
    from pspnet_fast.data.list_dataset import ListDataset
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.metrics import Metrics


@click.command("eval", short_help="Measure a checkpoint: IoU and accuracy by class, and their means.")
@click.argument("config", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--checkpoint", type=FILE, required=True, help="Model to measure.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores and the confusion matrix as JSON.")
@click.option("--pictures", type=click.IntRange(min=0), default=0, help="Also draw this many images beside the truth.")
@click.option("--out", type=FOLDER, default=Path("runs/eval"), show_default=True, help="Folder of the pictures.")
def evaluate(
    config: Path, overrides: tuple[str, ...], checkpoint: Path, as_json: bool, pictures: int, out: Path
) -> None:
    """Measure a checkpoint on the validation list of CONFIG: IoU and accuracy by class, mIoU, mAcc, allAcc.

    The model and the normalisation come from the checkpoint. Images are predicted whole, unless data.val_crop is set,
    at one scale, without flipping. A class that occurs neither in labels nor in predictions has no IoU and does not
    count in the mean.

    \b
    pspnet-fast eval configs/camvid.yaml data.root=/data/camvid --checkpoint runs/camvid/checkpoint.pt
    pspnet-fast eval configs/camvid.yaml data.root=/data/camvid --checkpoint runs/camvid/checkpoint.pt --pictures 4
    """
    from pspnet_fast.training.config import load_config
    from pspnet_fast.training.evaluation import choose_device
    from pspnet_fast.training.evaluation import evaluate as score
    from pspnet_fast.training.loading import val_loader

    settings = load_config(config, overrides)
    device = choose_device(settings.train.device)
    predictor = load_predictor(checkpoint, settings.train.device)
    names, _ = read_classes(settings.data)
    if names != predictor.class_names:
        raise ValueError(f"{checkpoint} has the classes {predictor.class_names}, {settings.data.names} has {names}")
    val_set = validation_set(settings.data, len(names), predictor.mean, predictor.std)
    metrics = score(
        predictor.model,
        val_loader(val_set, settings.train.val_batch_size, settings.train.workers, device.type == "cuda"),
        len(names),
        device,
        bf16=settings.train.bf16,
        channels_last=settings.train.channels_last,
    )
    click.echo(_scores_json(metrics, names) if as_json else _scores_table(metrics, names))
    if pictures:
        _draw_validation(predictor, val_set, pictures, out)


def _scores_table(metrics: "Metrics", names: Sequence[str]) -> str:
    width = max(len("class"), *map(len, names))
    lines = [f"{'class':<{width}}    IoU    acc"]
    for name, iou, accuracy in zip(names, metrics.iou.tolist(), metrics.accuracy.tolist(), strict=True):
        lines.append(f"{name:<{width}} {iou:6.4f} {accuracy:6.4f}".replace("   nan", "     -").replace(" nan", "   -"))
    lines.append(f"mIoU {metrics.miou:.4f}, mAcc {metrics.macc:.4f}, allAcc {metrics.allacc:.4f}")
    return "\n".join(lines)


def _scores_json(metrics: "Metrics", names: Sequence[str]) -> str:
    def by_class(values: Sequence[float]) -> dict[str, float | None]:
        return {name: None if math.isnan(value) else value for name, value in zip(names, values, strict=True)}

    return json.dumps(
        {
            "miou": metrics.miou,
            "macc": metrics.macc,
            "allacc": metrics.allacc,
            "iou": by_class(metrics.iou.tolist()),
            "accuracy": by_class(metrics.accuracy.tolist()),
            "confusion": metrics.confusion.tolist(),
        },
        indent=2,
    )


def _draw_validation(predictor: "Predictor", val_set: "ListDataset", count: int, out: Path) -> None:
    """Draw the first, the last and images evenly between them: image, truth, prediction."""
    import numpy as np

    from pspnet_fast.data.transforms import normalise
    from pspnet_fast.inference.render import colorize, save_png, side_by_side

    out.mkdir(parents=True, exist_ok=True)
    for index in np.linspace(0, len(val_set) - 1, min(count, len(val_set))).round().astype(int):
        image, label = val_set.read(index)
        prediction = predictor(normalise(image, predictor.mean, predictor.std)).numpy()
        row = [image.astype(np.uint8), colorize(label, predictor.colors), colorize(prediction, predictor.colors)]
        path = out / f"{val_set.pairs[index][0].stem}.png"
        save_png(path, side_by_side([row], ["image", "truth", "prediction"], predictor.class_names, predictor.colors))
        click.echo(f"drew {path}")
