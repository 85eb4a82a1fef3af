"""``pspnet-fast predict``."""

import time
from dataclasses import replace
from pathlib import Path

import click

from pspnet_fast.cli.common import (
    ANY,
    CHECKPOINT,
    FOLDER,
    OPTIMIZE,
    Numbers,
    chosen_protocol,
    load_predictor,
    optimized,
)
from pspnet_fast.cli.group import Stopped, sentence
from pspnet_fast.out_of_memory import is_out_of_memory


@click.command()
@click.argument("images", nargs=-1, required=True, type=ANY)
@click.option("--checkpoint", type=CHECKPOINT, required=True, help="File of `train` or folder of `convert`.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the results.")
@click.option("--overwrite", is_flag=True, help="Replace results that exist; images never are.")
@click.option("--labels", is_flag=True, help="Write NAME.png: the class index of each pixel.")
@click.option("--palette", is_flag=True, help="Write NAME_color.png: the class colours.")
@click.option("--overlay", is_flag=True, help="Write NAME_overlay.png: the colours over the image.")
@click.option("--confidence", is_flag=True, help="Write NAME_confidence.png: the class's probability, 255 for 1.")
@click.option("--probabilities", is_flag=True, help="Write NAME_probabilities.npy: of all classes, float16 (K, H, W).")
@click.option("--legend/--no-legend", default=True, show_default=True, help="Name the classes below each overlay.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Images of one size at a time.")
@click.option("--crop", type=Numbers(int, "N[,N]"), help="In windows of HEIGHT,WIDTH; one number is both.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@OPTIMIZE
def predict(
    images: tuple[Path, ...],
    checkpoint: Path,
    out: Path,
    overwrite: bool,
    legend: bool,
    batch: int,
    crop: tuple[int, ...] | None,
    device: str,
    optimize: bool | None,
    **chosen: bool,
) -> None:
    """Label IMAGES of any size: files, folders, patterns, and videos.

    Without a choice it writes --labels, --palette and --overlay, the latter with a legend of the classes that occur. A
    folder is searched to any depth, and its results lie in --out as the images in it. Nothing is written where a result
    would overwrite an image or another result. Images that cannot be read or are too large for the memory, and
    arguments that name no image, are left out and named at the end; the exit status is then 1.

    Images are predicted whole, or with --crop in windows that overlap by a third, whose probabilities are averaged. One
    that does not fit into the memory is predicted in windows of the training's size, with a warning.

    Of a video it writes videos without sound: NAME.mkv and NAME_confidence.mkv exactly (FFV1, grey), NAME_color.mp4 and
    NAME_overlay.mp4 to look at.

    \b
    pspnet-fast predict street.jpg --checkpoint runs/camvid/best.pt --out labels
    pspnet-fast predict photos drive.mp4 --checkpoint runs/camvid/best.pt --out labels --overlay --confidence
    pspnet-fast predict "photos/2024-*/*.jpg" --checkpoint runs/camvid/best.pt --out labels --overwrite
    """
    from tqdm import tqdm

    from pspnet_fast.data import DataError
    from pspnet_fast.inference.plan import DEFAULT, plan
    from pspnet_fast.inference.predict_files import predict_images, predict_video
    from pspnet_fast.inference.videos import VideoReader

    failed: list[Exception] = []
    try:
        outputs = [output for output, wanted in chosen.items() if wanted] or DEFAULT
        tasks = plan(images, out, outputs, overwrite=overwrite, failed=failed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if not tasks:
        raise DataError("; ".join(map(sentence, failed)))
    predictor = optimized(load_predictor(checkpoint, device), optimize)
    if crop:
        predictor = replace(predictor, protocol=chosen_protocol("whole", {"crop": crop}))
    out.mkdir(parents=True, exist_ok=True)
    pictures = [task for task in tasks if not task.is_video]
    videos = [task for task in tasks if task.is_video]
    labelled = {"images": 0, "videos": 0, "frames": 0}
    start = time.perf_counter()

    def told() -> str:
        parts = [f"{labelled['images']} of {len(pictures)} images"] if pictures else []
        if videos:
            parts.append(f"{labelled['videos']} of {len(videos)} videos ({labelled['frames']} frames)")
        return f"labelled {' and '.join(parts)} into {out}"

    try:
        with tqdm(total=len(pictures), unit="img", disable=None) as bar:
            for done in predict_images(predictor, pictures, batch, legend=legend, fail=failed.append):
                labelled["images"] += done is not None
                bar.update()
            for task in videos:
                try:
                    bar.total += VideoReader(task.image).frames
                    for frames in predict_video(predictor, task, batch):
                        labelled["frames"] += frames
                        bar.update(frames)
                    labelled["videos"] += 1
                except DataError as error:
                    failed.append(error)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    failed.append(DataError(f"{task.image}: out of memory; a smaller --batch or --crop takes less"))
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; {told()}", 130) from None
    speed = (labelled["images"] + labelled["frames"]) / (time.perf_counter() - start)
    click.echo(f"{told()}, {speed:.2f} images/s")
    if failed:
        raise DataError("; ".join(map(sentence, failed)))
