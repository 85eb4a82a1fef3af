"""``pspnet-fast predict``."""

from pathlib import Path

import click

from pspnet_fast.cli.common import FILE, FOLDER, load_predictor


@click.command()
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
    predictor = load_predictor(checkpoint, device)
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
