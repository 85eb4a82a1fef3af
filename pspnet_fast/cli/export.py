"""``pspnet-fast export``."""

from pathlib import Path
from typing import Any

import click

from pspnet_fast.cli.common import ANY, Numbers, load_predictor

FORMATS = ("onnx", "openvino", "torch-export", "aoti", "coreml")


@click.command()
@click.option("--checkpoint", type=ANY, required=True, help="Model, as `pspnet-fast train` or `convert` saved it.")
@click.option("--out", type=ANY, required=True, help="File: .onnx, .xml, .pt2 or .mlpackage.")
@click.option("--format", type=click.Choice(FORMATS), default="onnx", show_default=True, help="Runtime that reads it.")
@click.option(
    "--size", type=Numbers(int, "HEIGHT,WIDTH"), help="Of the image; by default the training's crop, or 473,473."
)
@click.option("--dynamic", is_flag=True, help="Batch, height and width may be any.")
@click.option("--argmax", is_flag=True, help="Return the class of each pixel, not logits.")
@click.option(
    "--normalise", is_flag=True, help="Take RGB (N, H, W, 3) uint8 as decoders give it, not normalised images."
)
@click.option("--portable", is_flag=True, help="torch-export and aoti without this package's kernels.")
@click.option("--winograd", is_flag=True, help="For CPUs in float32: large 3x3 convolutions by fewer products.")
@click.option("--int8", "calibration", type=ANY, help="Folder of images to quantise by (onnx and openvino).")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
def export(
    checkpoint: Path,
    out: Path,
    format: Any,
    size: tuple[int, ...] | None,
    dynamic: bool,
    argmax: bool,
    normalise: bool,
    portable: bool,
    winograd: bool,
    calibration: Path | None,
    overwrite: bool,
) -> None:
    """Write a trained model as a file for the runtime that it is deployed in, and check the file against PyTorch.

    The pyramid runs without its concatenation there too, as convolutions and products with matrices: no adaptive
    pooling, which runtimes know for few sizes, and half the head's arithmetic. Batch norms are folded. The file takes
    normalised images (N, 3, H, W) and returns logits (N, K, H, W), unless --normalise and --argmax say otherwise.

    torch-export and aoti call this package's kernels and need it at run time, unless --portable. A Core ML file is
    converted only: nothing but a Mac runs it. --winograd is for one size, and for runtimes that compute in float32 on a
    CPU: a PSPNet-50 takes a fifth less time there, and its file is larger by 60 %. With --int8 the convolutions are
    quantised by ONNX Runtime's quantiser; what of the classes changes by it is measured on those images that it has
    not seen, every fourth.

    \b
    pspnet-fast export --checkpoint runs/camvid/best.pt --out street.onnx --dynamic
    pspnet-fast export --checkpoint runs/camvid/best.pt --out street.xml --format openvino --size 720,960 \\
        --argmax --normalise --int8 data/camvid/train
    """
    import torch

    from pspnet_fast.deploy import export as write
    from pspnet_fast.deploy.int8 import images_of, quantise

    if size is not None and (len(size) > 2 or min(size) < 1):
        raise click.UsageError(f"--size must be one or two numbers of at least 1, got {','.join(map(str, size))}")
    if out.exists() and not overwrite:
        raise click.UsageError(f"--out: {out} exists; --overwrite replaces it")
    if calibration is not None and format not in ("onnx", "openvino"):
        raise click.UsageError(f"--int8 goes with --format onnx and openvino, not {format}")
    if calibration is not None and winograd:
        raise click.UsageError("--winograd does not go with --int8: in eight bits it loses too much")
    predictor = load_predictor(checkpoint, "cpu")
    height, width = (*size, *size)[:2] if size else predictor.crop or (473, 473)
    paths = images_of(calibration) if calibration is not None else []
    example = torch.randint(256, (1, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    statistics = predictor.mean, predictor.std
    if not normalise:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
        example = (example.permute(0, 3, 1, 2) / 255 - mean) / std
    settings: dict[str, Any] = {"dynamic": dynamic, "argmax": argmax, "normalise": statistics if normalise else None}
    report = write(predictor.model, example, path=out, format=format, portable=portable, winograd=winograd, **settings)
    click.echo(str(report))
    if calibration is not None:
        click.echo(str(quantise(predictor, out, format, paths, (height, width), settings)))
