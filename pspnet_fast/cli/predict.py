"""``pspnet-fast predict``."""

import sys
import time
from pathlib import Path

import click

from pspnet_fast.cli.common import ANY, FILE, FOLDER, load_predictor
from pspnet_fast.cli.group import Stopped, is_out_of_memory, sentence


@click.command()
@click.argument("images", nargs=-1, required=True, type=ANY)
@click.option("--checkpoint", type=FILE, required=True, help="Model, as `pspnet-fast train` saved it.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the results.")
@click.option("--overwrite", is_flag=True, help="Replace results that exist; images never are.")
@click.option("--legend/--no-legend", default=True, show_default=True, help="Name the classes below each overlay.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def predict(images: tuple[Path, ...], checkpoint: Path, out: Path, overwrite: bool, legend: bool, device: str) -> None:
    """Label IMAGES of any size, each as a whole: files, folders and patterns.

    For street.jpg it writes street.png (the class index of each pixel), street_color.png (class colours) and
    street_overlay.png (colours over the image, below it a legend of the classes that occur). A folder is searched to
    any depth, and its results lie in --out as the images in it. Nothing is written where a result would overwrite an
    image or another result. Images that cannot be read or are too large for the memory, and arguments that name no
    image, are left out and named at the end; the exit status is then 1.

    \b
    pspnet-fast predict street.jpg --checkpoint runs/camvid/best.pt --out labels
    pspnet-fast predict photos --checkpoint runs/camvid/best.pt --out labels --device cpu
    pspnet-fast predict "photos/2024-*/*.jpg" --checkpoint runs/camvid/best.pt --out labels --overwrite
    """
    import numpy as np
    from tqdm import tqdm

    from pspnet_fast.data import DataError
    from pspnet_fast.data.images import read_image, unused_bits
    from pspnet_fast.data.transforms import normalise
    from pspnet_fast.inference.plan import plan
    from pspnet_fast.inference.render import colorize, overlay, save_png, with_legend

    failed: list[Exception] = []
    try:
        tasks = plan(images, out, overwrite=overwrite, failed=failed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if not tasks:
        raise DataError("; ".join(map(sentence, failed)))
    predictor = load_predictor(checkpoint, device)
    out.mkdir(parents=True, exist_ok=True)
    done, start = 0, time.perf_counter()
    try:
        for task in tqdm(tasks, unit="img", disable=None):
            try:
                image = read_image(task.image)
                if text := unused_bits(image):
                    tqdm.write(f"Warning: {task.image}: {text}", sys.stderr)
                label = predictor(normalise(image, predictor.mean, predictor.std)).numpy()
                color = colorize(label, predictor.colors)
                blended = overlay(image.astype(np.uint8), label, predictor.colors)
                if legend:
                    present = np.unique(label).tolist()
                    blended = with_legend(blended, present, predictor.class_names, predictor.colors)
            except DataError as error:
                failed.append(error)
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed.append(DataError(f"{task.image}: out of memory; scale the image down or cut it up"))
                continue
            task.label.parent.mkdir(parents=True, exist_ok=True)
            save_png(task.label, label)
            save_png(task.color, color)
            save_png(task.overlay, blended)
            done += 1
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; labelled {done} of {len(tasks)} images into {out}", 130) from None
    speed = f"{done / (time.perf_counter() - start):.2f} images/s"
    click.echo(f"labelled {done} of {len(tasks)} images into {out}, {speed}")
    if failed:
        raise DataError("; ".join(map(sentence, failed)))
