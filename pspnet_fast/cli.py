"""Command line: ``pspnet-fast train | eval | predict | info``."""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pspnet_fast import __version__

if TYPE_CHECKING:  # these need the extras of pspnet_fast[train]; the commands import them when they run
    from pspnet_fast.data.list_dataset import ListDataset
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.config import DataConfig
    from pspnet_fast.training.metrics import Metrics

EXTRAS = {"numpy", "omegaconf", "yaml", "cv2", "tqdm", "matplotlib", "tensorboard"}
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


class _Group(click.Group):
    """Turns the errors that users can mend into one line on stderr: exit code 2 for the configuration, else 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if ctx.params["traceback"] or (error.name or "").partition(".")[0] not in EXTRAS:
                raise
            message = f"this command needs {error.name}: pip install 'pspnet_fast[train]'"
            raise click.ClickException(message) from None
        except (ValueError, OSError, FloatingPointError) as error:
            if ctx.params["traceback"]:
                raise
            message = str(error)
            if isinstance(error, OSError) and error.strerror:
                message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            # The configuration is part of the command, so its errors are errors of usage (click's exit code 2).
            kind = click.UsageError if type(error).__name__ == "ConfigError" else click.ClickException
            raise kind(message) from None
        except RuntimeError as error:
            if ctx.params["traceback"] or type(error).__name__ != "OutOfMemoryError":
                raise
            message = "out of GPU memory; try a smaller train.batch_size or data.crop, or train.bf16=true"
            raise click.ClickException(message) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="pspnet_fast %(version)s")
@click.option("--traceback", is_flag=True, help="Show where in the code an error arose.")
def main(traceback: bool) -> None:
    """Train a PSPNet, measure it, and label images with it.

    \b
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid
    pspnet-fast eval configs/camvid.yaml data.root=/data/camvid --checkpoint runs/camvid/checkpoint.pt
    pspnet-fast predict street.jpg --checkpoint runs/camvid/checkpoint.pt --out labels
    """


@main.command(short_help="Train as a YAML file says.")
@click.argument("config", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=FOLDER, help="Folder of the run; by default runs/ and the name of CONFIG.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in that folder.")
@click.option("--overwrite", is_flag=True, help="Start anew although that folder holds a checkpoint.")
@click.option("--print-config", is_flag=True, help="Print every setting, defaults included, and stop.")
def train(
    config: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, overwrite: bool, print_config: bool
) -> None:
    """Train as CONFIG (a YAML file) says; KEY=VALUE changes single settings.

    After each epoch the run's folder holds checkpoint.pt, log.jsonl, curves.png and tensorboard/. An interrupted run
    goes on with --resume and ends with the same weights (bit for bit on a CPU).

    \b
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid train.epochs=30 train.lr=0.02 --out runs/long
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid --resume
    pspnet-fast train configs/camvid.yaml --print-config
    """
    import torch
    from omegaconf import OmegaConf

    from pspnet_fast.data.transforms import TrainTransform
    from pspnet_fast.models import PSPNet
    from pspnet_fast.training.config import load_config
    from pspnet_fast.training.loop import CHECKPOINT, fit

    settings = load_config(config, overrides)
    if print_config:
        click.echo(OmegaConf.to_yaml(OmegaConf.structured(settings)).rstrip())
        return
    out = out or Path("runs") / config.stem
    checkpoint = out / CHECKPOINT
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if checkpoint.exists() and not (resume or overwrite):
        raise click.UsageError(f"{checkpoint} exists: go on with --resume, or start anew with --overwrite or --out")

    data = settings.data
    names, colors = _classes(data)
    transform = TrainTransform(data.crop, data.mean, data.std, data.scale, data.degrees, data.blur)
    train_set = _list_dataset(data, data.train_list, len(names), transform, settings.train.seed)
    val_set = _validation_set(data, len(names), data.mean, data.std)
    torch.manual_seed(settings.train.seed)
    model = PSPNet(len(names), **dataclasses.asdict(settings.model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(
        f"PSPNet {settings.model.backbone}, {len(names)} classes, {parameters / 1e6:.1f} M parameters; "
        f"{len(train_set)} training and {len(val_set)} validation images; writing to {out}"
    )
    metadata = {
        "model": dataclasses.asdict(settings.model),
        "colors": colors,
        "mean": data.mean,
        "std": data.std,
        "train_transform": dataclasses.asdict(transform),
    }
    try:
        result = fit(
            model, train_set, val_set, settings.train, out, class_names=names, resume=resume, metadata=metadata
        )
    except KeyboardInterrupt:
        if not checkpoint.exists():
            raise click.ClickException("interrupted before the end of the first epoch; nothing is saved") from None
        command = shlex.join(["pspnet-fast", "train", str(config), *overrides, "--out", str(out), "--resume"])
        raise click.ClickException(f"interrupted; {checkpoint} is whole. Go on with: {command}") from None
    click.echo(f"best mIoU {result.best_miou:.4f}, last {result.history[-1]['miou']:.4f}; saved {result.checkpoint}")


@main.command("eval", short_help="Measure a checkpoint: IoU and accuracy by class, and their means.")
@click.argument("config", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--checkpoint", type=FILE, required=True, help="Model to measure.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores and the confusion matrix as JSON.")
@click.option("--pictures", type=click.IntRange(min=0), default=0, help="Also draw this many images beside the truth.")
@click.option("--out", type=FOLDER, default=Path("runs/eval"), show_default=True, help="Folder of the pictures.")
def evaluate_command(
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
    from pspnet_fast.training.loading import val_loader
    from pspnet_fast.training.loop import choose_device, evaluate

    settings = load_config(config, overrides)
    device = choose_device(settings.train.device)
    predictor = _predictor(checkpoint, settings.train.device)
    names, _ = _classes(settings.data)
    if names != predictor.class_names:
        raise ValueError(f"{checkpoint} has the classes {predictor.class_names}, {settings.data.names} has {names}")
    val_set = _validation_set(settings.data, len(names), predictor.mean, predictor.std)
    metrics = evaluate(
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


@main.command()
@click.argument("images", nargs=-1, required=True, type=FILE)
@click.option("--checkpoint", type=FILE, required=True, help="Model, as `pspnet-fast train` saved it.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the label maps.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def predict(images: tuple[Path, ...], checkpoint: Path, out: Path, device: str) -> None:
    """Label IMAGES of any size, each as a whole.

    For street.jpg it writes street.png (the class index of each pixel), street_color.png (class colours) and
    street_overlay.png (colours over the image).

    \b
    pspnet-fast predict street.jpg --checkpoint runs/camvid/checkpoint.pt --out labels
    pspnet-fast predict photos/*.jpg --checkpoint runs/camvid/checkpoint.pt --out labels --device cpu
    """
    import numpy as np
    from tqdm import tqdm

    from pspnet_fast.data import DataError
    from pspnet_fast.data.list_dataset import read_image
    from pspnet_fast.data.transforms import normalise
    from pspnet_fast.inference.render import colorize, overlay, save_png

    stems = [path.stem for path in images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise click.UsageError(f"several images are named {', '.join(twice)}; their results would overwrite each other")
    predictor = _predictor(checkpoint, device)
    out.mkdir(parents=True, exist_ok=True)
    unreadable = []
    for path in tqdm(images, unit="img", disable=None):
        try:
            image = read_image(path)
        except DataError as error:
            unreadable.append(str(error))
            continue
        label = predictor(normalise(image, predictor.mean, predictor.std)).numpy()
        save_png(out / f"{path.stem}.png", label)
        save_png(out / f"{path.stem}_color.png", colorize(label, predictor.colors))
        save_png(out / f"{path.stem}_overlay.png", overlay(image.astype(np.uint8), label, predictor.colors))
    click.echo(f"labelled {len(images) - len(unreadable)} of {len(images)} images into {out}")
    if unreadable:
        raise DataError("; ".join(unreadable))


@main.command(short_help="Show versions, compiled kernels and this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show versions, the kernels that were compiled, and what this machine has.

    \b
    pspnet-fast info
    pspnet-fast info --json
    """
    from pspnet_fast import info as report

    facts = report.collect()
    click.echo(json.dumps(facts, indent=2) if as_json else report.format(facts))


def _classes(data: "DataConfig") -> tuple[list[str], list[tuple[int, int, int]]]:
    from pspnet_fast.data.list_dataset import read_colors, read_names

    root = Path(data.root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: no folder {root}; name it on the command line: data.root=FOLDER")
    names = read_names(root / data.names)
    return names, read_colors(root / data.colors, len(names))


def _list_dataset(data: "DataConfig", list_file: str, classes: int, transform: Any, seed: int = 0) -> "ListDataset":
    from pspnet_fast.data.list_dataset import ListDataset

    root = Path(data.root)
    return ListDataset(root, root / list_file, classes, transform, seed)


def _validation_set(data: "DataConfig", classes: int, mean: Sequence[float], std: Sequence[float]) -> "ListDataset":
    from pspnet_fast.data.transforms import EvalTransform

    return _list_dataset(data, data.val_list, classes, EvalTransform(mean, std, data.val_crop))


def _predictor(checkpoint: Path, device: str) -> "Predictor":
    from pspnet_fast.inference.predict import Predictor
    from pspnet_fast.training.checkpoint import load_checkpoint
    from pspnet_fast.training.loop import choose_device

    return Predictor.from_checkpoint(load_checkpoint(checkpoint), choose_device(device))


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


if __name__ == "__main__":
    main()
