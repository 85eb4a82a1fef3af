"""``pspnet-fast train``."""

import dataclasses
import shlex
from pathlib import Path

import click

from pspnet_fast.cli.common import FILE, FOLDER, pair_dataset, read_classes, skipped_text, validation_set
from pspnet_fast.cli.group import Stopped


@click.command(short_help="Train as a YAML file says.")
@click.argument("config", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=FOLDER, help="Folder of the run; by default runs/ and the name of CONFIG.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in that folder.")
@click.option("--allow", multiple=True, metavar="KEY", help="With --resume: a setting that may differ from the run's.")
@click.option("--overwrite", is_flag=True, help="Start anew although that folder holds a checkpoint.")
@click.option("--print-config", is_flag=True, help="Print every setting, defaults included, and stop.")
def train(
    config: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    allow: tuple[str, ...],
    overwrite: bool,
    print_config: bool,
) -> None:
    """Train as CONFIG (a YAML file) says; KEY=VALUE changes single settings.

    After each epoch the run's folder holds checkpoint.pt (the last epoch), best.pt (the best), log.jsonl, curves.png
    and tensorboard/. Ctrl+C and SIGTERM save the iteration they fall into. A run goes on with --resume and ends with
    the same weights as one that was never interrupted (bit for bit on a CPU); with --allow KEY it goes on under a
    setting that has changed, such as more epochs.

    \b
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid train.epochs=30 train.lr=0.02 --out runs/long
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid --resume
    pspnet-fast train configs/camvid.yaml data.root=/data/camvid train.epochs=20 --resume --allow train.epochs
    pspnet-fast train configs/camvid.yaml --print-config > my.yaml
    """
    import torch

    from pspnet_fast.data.checks import check_classes, check_lists, check_normalisation
    from pspnet_fast.data.transforms import TrainTransform
    from pspnet_fast.models import PSPNet
    from pspnet_fast.training.config_file import load_config
    from pspnet_fast.training.config_text import to_yaml
    from pspnet_fast.training.interruption import Interrupted
    from pspnet_fast.training.loop import fit
    from pspnet_fast.training.run_folder import BEST, CHECKPOINT, ResumeError

    settings = load_config(config, overrides)
    if print_config:
        click.echo(to_yaml(settings).rstrip())
        return
    out = out or Path("runs") / config.stem
    checkpoint = out / CHECKPOINT
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if allow and not resume:
        raise click.UsageError("--allow goes with --resume")
    existing = next((path for path in (checkpoint, out / BEST) if path.exists()), None)
    if existing and not (resume or overwrite):
        raise click.UsageError(f"{existing} exists: go on with --resume, or start anew with --overwrite or --out")

    data = settings.data
    names, colors = read_classes(data)
    transform = TrainTransform(data.crop, data.mean, data.std, data.scale, data.degrees, data.blur)
    train_set = pair_dataset(data, "train", len(names), transform, settings.train.seed)
    val_set = validation_set(data, len(names), data.mean, data.std)
    warnings = check_normalisation(data.mean, data.std) + check_lists(train_set, val_set)
    for warning in (*warnings, *check_classes(train_set, names), *check_classes(val_set, names)):
        click.echo(f"Warning: {warning}", err=True)
    torch.manual_seed(settings.train.seed)
    model = PSPNet(len(names), **dataclasses.asdict(settings.model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(
        f"PSPNet {settings.model.backbone}, {len(names)} classes, {parameters / 1e6:.1f} M parameters; "
        f"{len(train_set)} training and {len(val_set)} validation images; writing to {out}"
    )
    # Compared when the run is resumed; names and colours are compared by what their files hold.
    not_compared = {"root", "names", "colors", "mean", "std", "unreadable", "cache_gb"}
    metadata = {
        "model": dataclasses.asdict(settings.model),
        "colors": colors,
        "labels": data.labels,
        "remap": {str(value): index for value, index in data.remap.items()},
        "mean": data.mean,
        "std": data.std,
        "data": {name: value for name, value in dataclasses.asdict(data).items() if name not in not_compared},
    }
    again = shlex.join(["pspnet-fast", "train", str(config), *overrides, "--out", str(out), "--resume"])
    try:
        result = fit(
            model,
            train_set,
            val_set,
            settings.train,
            out,
            class_names=names,
            resume=resume,
            allow=allow,
            metadata=metadata,
        )
    except Interrupted as error:
        raise Stopped(f"{error}; {checkpoint} holds the state. Go on with: {again}", 128 + error.signal) from None
    except KeyboardInterrupt:
        saved = f"{checkpoint} is whole. Go on with: {again}" if checkpoint.exists() else "nothing is saved"
        raise Stopped(f"interrupted at once; {saved}", 130) from None
    except ResumeError as error:
        hint = "".join(f" --allow {shlex.quote(key)}" for key in error.changed)
        raise click.ClickException(f"{error}{hint and f'. To go on with the new values:{hint}'}") from None
    if text := skipped_text(train_set, val_set):
        click.echo(f"Warning: {text}", err=True)
    last = result.history[-1]["miou"]
    if result.best is None:
        click.echo(f"no mIoU, since no pixel of {val_set.source} is labelled; saved {result.checkpoint}")
    else:
        last_text = "-" if last is None else f"{last:.4f}"
        click.echo(f"best mIoU {result.best_miou:.4f}: {result.best}; last {last_text}: {result.checkpoint}")
