"""``pspnet-fast eval``."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pspnet_fast.cli.common import FILE, FOLDER, load_predictor, read_classes, skipped_text, validation_set

if TYPE_CHECKING:
    from pspnet_fast.data.list_dataset import PairDataset
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.metrics import Metrics


@click.command("eval", short_help="Measure a checkpoint: IoU and accuracy by class, and their means.")
@click.argument("config", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--checkpoint", type=FILE, required=True, help="Model to measure.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores and the confusion matrix as JSON.")
@click.option("--pictures", type=click.IntRange(min=0), default=0, help="Also draw this many images beside the truth.")
@click.option("--out", type=FOLDER, default=Path("runs/eval"), show_default=True, help="Folder of the pictures.")
@click.option("--overwrite", is_flag=True, help="Replace pictures that exist.")
def evaluate(
    config: Path,
    overrides: tuple[str, ...],
    checkpoint: Path,
    as_json: bool,
    pictures: int,
    out: Path,
    overwrite: bool,
) -> None:
    """Measure a checkpoint on the validation list of CONFIG: IoU and accuracy by class, mIoU, mAcc, allAcc.

    The model and the normalisation come from the checkpoint. Images are predicted whole, unless data.val_crop is set,
    at one scale, without flipping. A class that occurs neither in labels nor in predictions has no IoU and does not
    count in the mean. With --json nothing else is printed to stdout; a score that does not exist is null.

    \b
    pspnet-fast eval configs/camvid.yaml data.root=/data/camvid --checkpoint runs/camvid/checkpoint.pt
    pspnet-fast eval configs/camvid.yaml data.root=/data/camvid --checkpoint runs/camvid/checkpoint.pt --pictures 4
    """
    from pspnet_fast.data.checks import check_lists, unlabelled
    from pspnet_fast.training.config_file import load_config
    from pspnet_fast.training.evaluation import choose_device
    from pspnet_fast.training.evaluation import evaluate as score
    from pspnet_fast.training.loading import val_loader

    settings = load_config(config, overrides)
    device = choose_device(settings.train.device)
    predictor = load_predictor(checkpoint, settings.train.device)
    names, _ = read_classes(settings.data)
    if difference := _first_difference(predictor.class_names, names):
        raise ValueError(f"{checkpoint} and {settings.data.names} have different classes: {difference}")
    val_set = validation_set(settings.data, len(names), predictor.mean, predictor.std)
    drawn = _plan_pictures(val_set, pictures, out, overwrite)
    for warning in check_lists(val_set):
        click.echo(f"Warning: {warning}", err=True)
    metrics = score(
        predictor.model,
        val_loader(val_set, settings.train.val_batch_size, settings.train.workers, device.type == "cuda"),
        len(names),
        device,
        bf16=settings.train.bf16,
        channels_last=settings.train.channels_last,
    )
    if text := skipped_text(val_set):
        click.echo(f"Warning: {text}", err=True)
    if not metrics.confusion.any():
        click.echo(f"Warning: no pixel of {val_set.source} is labelled: there are no scores", err=True)
    elif missing := unlabelled(metrics.confusion.sum(1).tolist(), names):
        click.echo(f"Warning: {val_set.source}: {missing}", err=True)
    click.echo(_scores_json(metrics, names) if as_json else _scores_table(metrics, names))
    for index, path in drawn.items():
        _draw(predictor, val_set, index, path)
        click.echo(f"drew {path}", err=as_json)


def _first_difference(trained: Sequence[str], named: Sequence[str]) -> str | None:
    """Where the checkpoint's class names and the file's part."""
    for index, (one, other) in enumerate(zip(trained, named, strict=False)):
        if one != other:
            return f"class {index} is {one!r} in the checkpoint, {other!r} in the file"
    if len(trained) != len(named):
        return f"{len(trained)} in the checkpoint, {len(named)} in the file"
    return None


def _scores_table(metrics: "Metrics", names: Sequence[str]) -> str:
    width = max(len("class"), *map(len, names))
    lines = [f"{'class':<{width}}    IoU    acc"]
    for name, iou, accuracy in zip(names, metrics.iou.tolist(), metrics.accuracy.tolist(), strict=True):
        lines.append(f"{name:<{width}} {_score(iou):>6} {_score(accuracy):>6}")
    means = (("mIoU", metrics.miou), ("mAcc", metrics.macc), ("allAcc", metrics.allacc))
    return "\n".join([*lines, ", ".join(f"{title} {_score(value)}" for title, value in means)])


def _score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _scores_json(metrics: "Metrics", names: Sequence[str]) -> str:
    record = metrics.record()
    accuracy = [None if math.isnan(value) else value for value in metrics.accuracy.tolist()]
    scores = {
        **record,
        "iou": dict(zip(names, record["iou"], strict=True)),
        "accuracy": dict(zip(names, accuracy, strict=True)),
        "confusion": metrics.confusion.tolist(),
    }
    return json.dumps(scores, indent=2, allow_nan=False)


def _plan_pictures(val_set: "PairDataset", count: int, out: Path, overwrite: bool) -> dict[int, Path]:
    """The first, the last and images evenly between them, by index, and their pictures; settled before measuring."""
    import numpy as np

    from pspnet_fast.inference.plan import check_results

    indices = np.linspace(0, len(val_set) - 1, min(count, len(val_set))).round().astype(int).tolist()
    drawn = {index: out / f"{val_set.pairs[index][0].stem}.png" for index in indices}
    try:
        inputs = [path for pair in val_set.pairs for path in pair]
        check_results(
            [(val_set.pairs[index][0], path) for index, path in drawn.items()], inputs=inputs, overwrite=overwrite
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return drawn


def _draw(predictor: "Predictor", val_set: "PairDataset", index: int, path: Path) -> None:
    """Draw image, truth and prediction side by side."""
    import numpy as np

    from pspnet_fast.data.transforms import normalise
    from pspnet_fast.inference.render import colorize, save_png, side_by_side

    image, label = val_set.read(index)
    prediction = predictor(normalise(image, predictor.mean, predictor.std)).numpy()
    row = [image.astype(np.uint8), colorize(label, predictor.colors), colorize(prediction, predictor.colors)]
    sheet = side_by_side([row], ["image", "truth", "prediction"], predictor.class_names, predictor.colors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, sheet)
