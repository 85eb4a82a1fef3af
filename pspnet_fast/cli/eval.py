"""``pspnet-fast eval``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pspnet_fast.cli.common import (
    CHECKPOINT,
    FILE,
    FOLDER,
    OPTIMIZE,
    Numbers,
    chosen_protocol,
    data_path,
    load_predictor,
    optimized,
    pair_dataset,
    read_classes,
    skipped_text,
)

if TYPE_CHECKING:
    from pspnet_fast.cli.eval_results import Results
    from pspnet_fast.data.list_dataset import PairDataset
    from pspnet_fast.inference.memory import Plan
    from pspnet_fast.inference.protocol import Protocol
    from pspnet_fast.inference.sliding import Segmenter
    from pspnet_fast.training.config import Config
    from pspnet_fast.training.scoring import Scores

KINDS = ("labels", "colors", "overlays")


class _Kinds(click.ParamType):
    """Some of the words in KINDS, with commas between them."""

    name = ",".join(KINDS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        kinds = value if isinstance(value, tuple) else tuple(value.split(","))
        if wrong := [kind for kind in kinds if kind not in KINDS]:
            self.fail(f"must be some of {', '.join(KINDS)}, got {', '.join(map(repr, wrong))}", param, ctx)
        return kinds


class _Bytes(click.ParamType):
    """A size such as 4G."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from pspnet_fast.inference.memory import parse_bytes

        try:
            return parse_bytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command("eval", short_help="Measure a checkpoint under a test protocol: scores by class, and means.")
@click.argument("config", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--checkpoint", type=CHECKPOINT, required=True, help="File of `train` or folder of `convert`.")
@click.option(
    "--protocol",
    type=click.Choice(["whole", "semseg", "mmseg"]),
    default="whole",
    show_default=True,
    help="Sizes, windows and averages as published; the options below change them.",
)
@click.option("--base-size", type=Numbers(int, "N[,N]"), help="What scale 1 is: long side, with mmseg LONG,SHORT.")
@click.option("--scales", type=Numbers(float, "N[,N...]"), help="Average over these sizes of the image.")
@click.option("--flip/--no-flip", default=None, help="Average over the mirrored image as well.")
@click.option("--crop", type=Numbers(int, "N[,N]"), help="Windows of HEIGHT,WIDTH; one number is both.")
@click.option("--stride-rate", type=click.FloatRange(0, 1, min_open=True), help="Their step over their size; 2/3.")
@click.option("--absent", type=click.Choice(["skip", "zero", "one", "nan"]), help="What absent classes count in means.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Most windows at a time.")
@click.option("--memory", type=_Bytes(), help="Bound, 4G or 500M: of the process, or of torch on a GPU.")
@click.option("--boundary", is_flag=True, help="Also measure boundary IoU.")
@click.option("--calibration", is_flag=True, help="Also measure how far confidence can be trusted (ECE).")
@click.option(
    "--bootstrap", type=click.IntRange(min=0), default=1000, show_default=True, help="Samples of mIoU's interval."
)
@click.option("--out", type=FOLDER, help="Folder of scores.json, tables and pictures; without it nothing is written.")
@click.option("--save", type=_Kinds(), default=(), help="Also write these for every image.")
@click.option("--gallery", type=click.IntRange(min=0), default=0, help="Draw this many best, median and worst images.")
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@OPTIMIZE
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON and nothing else.")
def evaluate(
    config: Path,
    overrides: tuple[str, ...],
    checkpoint: Path,
    protocol: str,
    batch: int,
    memory: int | None,
    boundary: bool,
    calibration: bool,
    bootstrap: int,
    out: Path | None,
    save: tuple[str, ...],
    gallery: int,
    overwrite: bool,
    optimize: bool | None,
    as_json: bool,
    **changes: Any,
) -> None:
    """Measure a checkpoint on the validation list of CONFIG under a test protocol.

    The model and the normalisation come from the checkpoint. By default images are predicted whole, at one scale,
    without flipping, and a class that occurs neither in labels nor in predictions does not count in the mean.
    `--protocol semseg` and `mmseg` predict and average as these do, `--crop`, `--scales` and `--flip` make a protocol
    of your own; the protocol is printed in words. With --memory the batch of windows is chosen to fit. With --out it
    leaves scores.json, classes.csv, images.csv and confusion.png, and what --save and --gallery ask for; `pspnet-fast
    eval-compare` compares two scores.json. torchrun shares the images among processes. (docs/evaluation.md)

    \b
    pspnet-fast eval configs/camvid.yaml data.root=/data/camvid --checkpoint best.pt --out runs/camvid/eval
    pspnet-fast eval configs/camvid.yaml data.root=/data/camvid --checkpoint best.pt --crop 241,321 --scales 0.75,1,1.25
    pspnet-fast eval configs/ade20k.yaml data.root=/data/ade --checkpoint best.pt --protocol semseg --base-size 512
    """
    from pspnet_fast.data.checks import check_lists, unlabelled
    from pspnet_fast.training.config_file import load_config
    from pspnet_fast.training.distributed import World, join, leave
    from pspnet_fast.training.evaluation import choose_device
    from pspnet_fast.training.score_files import FORMAT, scores_record, table
    from pspnet_fast.training.score_files import as_json as to_json
    from pspnet_fast.training.scoring import score_images

    if out is None and (save or gallery):
        raise click.UsageError("--save and --gallery write files: name a folder with --out")
    settings, world = load_config(config, overrides), World.from_environment()
    rule = chosen_protocol(protocol, changes)
    device = choose_device(settings.train.device, world.local_rank)
    predictor = load_predictor(checkpoint, str(device))
    names, _ = read_classes(settings.data)
    if difference := _first_difference(predictor.class_names, names):
        raise ValueError(f"{checkpoint} and {settings.data.names} have different classes: {difference}")
    val_set = _pixels(settings, len(names), predictor.mean)
    if not (settings.train.bf16 or settings.train.fp16):  # under autocast an optimized model gains nothing
        predictor = optimized(predictor, optimize)
    segmenter = _segmenter(predictor, rule, batch, settings)
    images = _names(val_set, data_path(settings.data))
    results = _results(out, val_set, images, predictor.colors, save, overwrite=overwrite)
    for warning in check_lists(val_set) if world.first else ():
        click.echo(f"Warning: {warning}", err=True)
    sentences = rule.describe()
    if crop := settings.data.val_crop:
        sentences.insert(0, f"of each image the centre of {crop[0]}x{crop[1]} (height x width), padded with the mean")
    if world.first:
        click.echo("protocol: " + "\n          ".join(sentences), err=as_json)
    join(world, device)
    scores = score_images(
        segmenter,
        val_set,
        batch_size=settings.train.val_batch_size,
        workers=settings.train.workers,
        budget=memory,
        boundary=boundary,
        calibration=calibration,
        world=world,
        predicted=results.save if results and save else None,
        planned=_tell if memory and world.first else None,
    )
    leave()
    if not world.first:
        return
    _warn(scores, val_set, names, unlabelled)
    record: dict[str, Any] = {
        "format": FORMAT,
        "checkpoint": checkpoint.name,
        "config": config.name,
        "classes": names,
        "colors": [list(color) for color in predictor.colors],
        "protocol": rule.record(),
        "protocol_text": sentences,
        **scores_record(scores, names, images, bootstrap),
        "gallery": [],
    }
    if results:
        # One window at a time is what surely fits.
        results.write(record, replace(segmenter, batch=1, host=True) if memory else segmenter, gallery)
    click.echo(to_json(record) if as_json else _summary(table(record), record, results))


def _pixels(settings: "Config", classes: int, mean: Sequence[float]) -> "PairDataset":
    from pspnet_fast.data.transforms import PixelTransform

    return pair_dataset(settings.data, "val", classes, PixelTransform(mean, settings.data.val_crop))


def _segmenter(predictor: Any, protocol: "Protocol", batch: int, settings: "Config") -> "Segmenter":
    import torch

    from pspnet_fast.inference.sliding import Segmenter

    train = settings.train
    autocast = torch.float16 if train.fp16 else torch.bfloat16 if train.bf16 else None
    return Segmenter(
        predictor.model,
        len(predictor.class_names),
        predictor.mean,
        predictor.std,
        protocol,
        batch,
        autocast=autocast,
        channels_last=train.channels_last,
    )


def _results(out: Path | None, *arguments: Any, overwrite: bool) -> "Results | None":
    """Where results go, settled before measuring."""
    from pspnet_fast.cli.eval_results import Results

    if out is None:
        return None
    results = Results(out, *arguments)
    try:
        results.check(overwrite)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return results


def _names(val_set: "PairDataset", root: Path) -> list[str]:
    """Images as their list has them: relative to the data's folder where they lie in it."""
    return [str(path.relative_to(root) if path.is_relative_to(root) else path) for path, _ in val_set.pairs]


def _tell(plan: "Plan") -> None:
    from pspnet_fast.files import megabytes

    host = f" on the device and {megabytes(plan.host_bytes)} on the host" if plan.host_bytes else ""
    click.echo(
        f"{plan.segmenter.batch} windows or images at a time, an estimated {megabytes(plan.device_bytes)}{host} "
        "beside the model",
        err=True,
    )


def _warn(scores: "Scores", val_set: "PairDataset", names: Sequence[str], unlabelled: Any) -> None:
    if text := skipped_text(val_set):
        click.echo(f"Warning: {text}", err=True)
    confusion = scores.metrics.confusion
    if not confusion.any():
        click.echo(f"Warning: no pixel of {val_set.source} is labelled: there are no scores", err=True)
    elif missing := unlabelled(confusion.sum(1).tolist(), names):
        click.echo(f"Warning: {val_set.source}: {missing}", err=True)


def _summary(table: str, record: dict[str, Any], results: "Results | None") -> str:
    count, time = len(record["images"]), record["time"]
    lines = [table, f"{count} images in {time['seconds']:.1f} s, {time['images_per_second']:.2f} images/s"]
    scored = sorted((image["miou"], image["image"]) for image in record["images"] if image["miou"] is not None)
    if len(scored) > 1:
        lines.append("worst images: " + ", ".join(f"{name} {miou:.4f}" for miou, name in scored[:3]))
    if results:
        lines.append(f"wrote {results.out / 'scores.json'}")
    return "\n".join(lines)


def _first_difference(trained: Sequence[str], named: Sequence[str]) -> str | None:
    """Where the checkpoint's class names and the file's part."""
    for index, (one, other) in enumerate(zip(trained, named, strict=False)):
        if one != other:
            return f"class {index} is {one!r} in the checkpoint, {other!r} in the file"
    if len(trained) != len(named):
        return f"{len(trained)} in the checkpoint, {len(named)} in the file"
    return None
