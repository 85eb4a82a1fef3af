"""``pspnet-fast train``."""

import dataclasses
import shlex
from pathlib import Path

import click

from pspnet_fast.cli.common import FILE, FOLDER, list_dataset, read_classes, validation_set


@click.command(short_help="Train as a YAML file says.")
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

    from pspnet_fast.data.checks import check_lists, check_normalisation
    from pspnet_fast.data.transforms import TrainTransform
    from pspnet_fast.models import PSPNet
    from pspnet_fast.training.config import load_config
    from pspnet_fast.training.config_text import to_yaml
    from pspnet_fast.training.loop import CHECKPOINT, fit

    settings = load_config(config, overrides)
    if print_config:
        click.echo(to_yaml(settings).rstrip())
        return
    out = out or Path("runs") / config.stem
    checkpoint = out / CHECKPOINT
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if checkpoint.exists() and not (resume or overwrite):
        raise click.UsageError(f"{checkpoint} exists: go on with --resume, or start anew with --overwrite or --out")

    data = settings.data
    names, colors = read_classes(data)
    transform = TrainTransform(data.crop, data.mean, data.std, data.scale, data.degrees, data.blur)
    train_set = list_dataset(data, data.train_list, len(names), transform, settings.train.seed)
    val_set = validation_set(data, len(names), data.mean, data.std)
    for warning in (*check_normalisation(data.mean, data.std), *check_lists(train_set, val_set)):
        click.echo(f"Warning: {warning}", err=True)
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
        "labels": data.labels,
        "remap": {str(value): index for value, index in data.remap.items()},
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
