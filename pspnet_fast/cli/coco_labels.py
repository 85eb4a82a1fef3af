"""``pspnet-fast coco-labels``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pspnet_fast.cli.common import FILE, FOLDER

if TYPE_CHECKING:
    from pspnet_fast.data.coco import CocoFile


@click.command("coco-labels", short_help="Write the annotations of a COCO JSON file as label images.")
@click.argument("annotations", type=FILE)
@click.option("--images", type=FOLDER, required=True, help="Folder of the photographs.")
@click.option("--out", type=FOLDER, required=True, help="Folder for labels, list, names and colours: a data.root.")
@click.option("--segments", type=FOLDER, help="Of panoptic annotations: the folder of their PNG files.")
@click.option("--background", metavar="NAME", help="Class of the pixels that nothing covers; else they are ignored.")
@click.option("--overwrite", is_flag=True, help="Replace labels and list where they exist.")
def coco_labels(
    annotations: Path, images: Path, out: Path, segments: Path | None, background: str | None, overwrite: bool
) -> None:
    """Write the polygons, run lengths or panoptic segments of ANNOTATIONS (COCO's JSON) as labels to train with.

    A label is a PNG of class indices. Classes are the categories by ascending id; where segments overlap the smaller
    lies on top. For instances.json --out gets labels/instances/*.png, the list instances.txt, names.txt and, where the
    categories have them, colors.txt. Two files of the same categories go into one folder. Images without an annotation
    are left out where there is no --background; those that cannot be used are named, and the exit status is then 1.

    \b
    pspnet-fast coco-labels instances_train2017.json --images train2017 --out data --background background
    pspnet-fast coco-labels instances_val2017.json --images val2017 --out data --background background
    pspnet-fast train configs/folders.yaml data.layout=null data.root=data data.train_list=instances_train2017.txt \\
        data.val_list=instances_val2017.txt
    pspnet-fast coco-labels panoptic_val2017.json --images val2017 --segments panoptic_val2017 --out data
    """
    import numpy as np
    from tqdm import tqdm

    from pspnet_fast.data import IGNORE_INDEX, DataError
    from pspnet_fast.data.coco import CocoFile
    from pspnet_fast.files import replacing
    from pspnet_fast.inference.render import save_png

    coco = CocoFile(annotations, background, segments)
    list_file, folder = out / f"{annotations.stem}.txt", out / "labels" / annotations.stem
    if list_file.exists() and not overwrite:
        raise click.UsageError(f"{list_file} exists: replace with --overwrite, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _write_classes(coco, out)
    lines, failed, empty = [], [], 0
    for entry, label in tqdm(coco.labels(), total=len(coco.images), unit="img", disable=None):
        name = Path(entry["file_name"])
        photograph = images / name
        if name.is_absolute() or ".." in name.parts:
            failed.append(f"{annotations}: {name} is outside --images")
        elif isinstance(label, DataError):
            failed.append(str(label))
        elif not photograph.is_file():
            failed.append(f"no image {photograph}")
        elif np.all(label == IGNORE_INDEX):
            empty += 1
        else:
            path = folder / name.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, label)
            lines.append(f"{os.path.relpath(photograph, out)}\t{os.path.relpath(path, out)}\n")
    with replacing(list_file) as file:
        file.write("".join(lines).encode())
    click.echo(f"{len(lines)} labels of {len(coco.names)} classes: {list_file}; {empty} images without an annotation")
    if failed:
        more = f"; and {len(failed) - 10} more" if len(failed) > 10 else ""
        raise click.ClickException(f"{len(failed)} images cannot be used: {'; '.join(failed[:10])}{more}")


def _write_classes(coco: "CocoFile", out: Path) -> None:
    from pspnet_fast.files import replacing

    texts = {"names.txt": "".join(f"{name}\n" for name in coco.names)}
    if coco.colors:
        texts["colors.txt"] = "".join("{} {} {}\n".format(*color) for color in coco.colors)
    for name, text in texts.items():
        path = out / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} has other classes than {coco.path}; choose another --out")
        with replacing(path) as file:
            file.write(text.encode())
