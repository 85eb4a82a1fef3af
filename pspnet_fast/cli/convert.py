"""``pspnet-fast convert``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pspnet_fast.cli.common import CHECKPOINT, FOLDER, Numbers

if TYPE_CHECKING:
    from pspnet_fast.convert import Report

_SOURCES = ("auto", "semseg", "mmseg", "smp", "paddleseg", "torchvision", "timm", "encoding", "tramac", "pspnet_fast")
_COMMON_BINS = "1,2,3,6"


@click.command()
@click.argument("checkpoint", type=CHECKPOINT)
@click.option("--from", "source", type=click.Choice(_SOURCES), default="auto", show_default=True, help="Its package.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the model.")
@click.option("--overwrite", is_flag=True, help="Replace these files where they exist.")
@click.option("--classes", type=click.IntRange(min=1), help="Another number leaves the classifiers random.")
@click.option("--names", metavar="FILE|SET", help="A class name a line; or ade20k, camvid, cityscapes, cocostuff, voc.")
@click.option("--colors", metavar="FILE", help="R G B a line, by class; a published SET has its own.")
@click.option("--align-corners/--no-align-corners", default=None, help="Of all upsampling, in place of the source's.")
@click.option("--dilation", type=click.Choice(["full", "contracted"]), help="Of the first block of a dilated stage.")
@click.option("--output-stride", type=click.Choice(["8", "16", "32"]), help="8 unless the checkpoint tells.")
@click.option("--bins", type=Numbers(int, "N[,N...]"), help=f"Sizes of the pyramid's grids; {_COMMON_BINS} is assumed.")
@click.option(
    "--concat", type=click.Choice(["input_first", "input_last"]), help="The features before the levels or after."
)
@click.option("--mean", type=Numbers(float, "R,G,B"), help="Of images in 0..1, in place of the source's.")
@click.option("--std", type=Numbers(float, "R,G,B"), help="Likewise.")
@click.option("--bgr", is_flag=True, help="The source takes BGR (and so do --mean, --std); the result takes RGB.")
@click.option("--strict/--no-strict", default=True, show_default=True, help="Refuse what is not filled or not known.")
@click.option("--verbose", is_flag=True, help="List every entry: its name in the file, and in the model.")
def convert(
    checkpoint: Path,
    source: str,
    out: Path,
    overwrite: bool,
    classes: int | None,
    names: str | None,
    colors: str | None,
    output_stride: str | None,
    strict: bool,
    verbose: bool,
    **settings: Any,
) -> None:
    """Make a model of a CHECKPOINT of another package: a PSPNet, or a ResNet alone.

    CHECKPOINT is a file of torch.save, .safetensors or .npz, a folder with one, or what `pspnet-fast train` saved. Its
    package is recognised by names and shapes. What these do not show (dilation, align_corners, bins, colours, mean and
    std) is taken as that package builds it, and every assumption is printed and written into the result; options say
    otherwise. Where segmentation_models_pytorch, torchvision or timm is installed, its own model with these weights has
    to give the same outputs. Nothing is written where something stays unset or is not known. Files that need pickled
    objects are refused, for reading them can run any code. A ResNet alone needs --classes and gives a model whose head
    has to be trained. (docs/convert.md)

    \b
    pspnet-fast convert psp_r50-d8.pth --out psp_cityscapes --names cityscapes
    pspnet-fast convert train_epoch_100.pth --from semseg --out psp_ade --names ade20k
    pspnet-fast convert best_model.safetensors --from smp --out psp_own --names names.txt --colors colors.txt
    pspnet-fast convert resnet50.pth --from torchvision --classes 19 --out start
    """
    from pspnet_fast.convert import convert as convert_checkpoint
    from pspnet_fast.models.folder import check_free

    try:
        check_free(out, overwrite)
    except FileExistsError as error:
        raise click.UsageError(f"{error}: --overwrite, or another --out") from None
    class_names, class_colors = _read_classes(names, colors)
    settings["output_stride"] = int(output_stride) if output_stride else None
    settings["bins"] = list(settings["bins"]) if settings["bins"] else None
    model, report = convert_checkpoint(
        checkpoint, source, classes=classes, class_names=class_names, colors=class_colors, strict=strict, **settings
    )
    model.save_pretrained(out, overwrite=overwrite)
    if verbose:
        _list(report)
    click.echo(str(report))
    click.echo(f"wrote {out}")


def _read_classes(names: str | None, colors: str | None) -> tuple[list[str] | None, list[tuple[int, int, int]] | None]:
    from pspnet_fast.data.layouts import LAYOUTS, read_published_classes
    from pspnet_fast.data.lists import read_colors, read_names

    if names is None:
        if colors is not None:
            raise click.UsageError("--colors goes with --names")
        return None, None
    published = sorted({layout.classes for layout in LAYOUTS.values() if layout.classes})
    class_names: list[str]
    class_colors: list[tuple[int, int, int]] | None = None
    if names in published and not Path(names).exists():
        class_names, class_colors = read_published_classes(names)
    elif Path(names).is_file():
        class_names = read_names(Path(names))
    else:
        raise click.UsageError(f"--names must be a file or one of {', '.join(published)}, got {names!r}")
    return class_names, read_colors(Path(colors), len(class_names)) if colors else class_colors


def _list(report: "Report") -> None:
    names = {own: theirs for theirs, own in report.remapped.items()}
    for own in report.loaded:
        click.echo(f"{names.get(own, own)} -> {own}")
    for name, reason in report.dropped.items():
        click.echo(f"{name} dropped: {reason}")
