"""Prediction of the images and videos of a plan, in batches, into the files that it names."""

import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack

from tqdm import tqdm

from pspnet_fast.data import DataError
from pspnet_fast.data.images import Image, read_image, unused_bits
from pspnet_fast.inference.batches import batches
from pspnet_fast.inference.plan import Task
from pspnet_fast.inference.predict import Prediction, Predictor
from pspnet_fast.inference.results import make_results, save_result
from pspnet_fast.inference.videos import VideoReader, VideoWriter
from pspnet_fast.out_of_memory import is_out_of_memory

Fail = Callable[[Exception], None]


def predict_images(
    predictor: Predictor, tasks: Sequence[Task], batch: int, *, legend: bool, fail: Fail
) -> Iterator[Task | None]:
    """Predict images, up to ``batch`` of one size together, and write their results.

    Args:
        legend: name the classes that occur below the overlays.
        fail: takes the error of an image that cannot be read or is too large for the memory; the others go on.

    Yields:
        each task once its files are written, and None for one that failed.
    """
    failed = 0

    def fail_one(error: Exception) -> None:
        nonlocal failed
        failed += 1
        fail(error)

    for group in batches(_readable(tasks, fail_one), batch):
        for task, image, prediction in _predict(predictor, group, fail_one):
            results = make_results(image, prediction, predictor, task.results, legend)
            for output, path in task.results.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_result(path, results[output])
            yield task
        yield from itertools.repeat(None, failed)
        failed = 0
    yield from itertools.repeat(None, failed)


def _readable(tasks: Sequence[Task], fail: Fail) -> Iterator[tuple[Task, Image]]:
    for task in tasks:
        try:
            image = read_image(task.image)
        except DataError as error:
            fail(error)
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fail(_too_large(task))
            continue
        if text := unused_bits(image):
            tqdm.write(f"Warning: {task.image}: {text}", sys.stderr)
        yield task, image


def _predict(
    predictor: Predictor, group: Sequence[tuple[Task, Image]], fail: Fail
) -> Iterator[tuple[Task, Image, Prediction]]:
    """Predict a group; where it is too large for the memory, image by image, and at last in windows."""
    outputs = group[0][0].results
    try:
        predictions = predictor.predict([image for _, image in group], **_wanted(outputs))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        predictions = []
    if predictions:
        for (task, image), prediction in zip(group, predictions, strict=True):
            yield task, image, prediction
        return
    if len(group) > 1:
        for one in group:
            yield from _predict(predictor, [one], fail)
        return
    task, windows = group[0][0], predictor.in_windows()
    if windows is None:
        fail(_too_large(task))
        return
    size = "x".join(map(str, windows.protocol.crop or ()))
    tqdm.write(f"Warning: {task.image}: out of memory as a whole; in windows of {size} (height x width)", sys.stderr)
    yield from _predict(windows, group, fail)


def _too_large(task: Task) -> DataError:
    return DataError(f"{task.image}: out of memory; a smaller --crop takes less")


def _wanted(outputs: Collection[str]) -> dict[str, bool]:
    return {name: name in outputs for name in ("confidence", "probabilities")}


def predict_video(predictor: Predictor, task: Task, batch: int) -> Iterator[int]:
    """Predict a video, ``batch`` frames at a time, and write its results as videos of the same rate, without legend.

    Warns where fewer frames can be read than the file tells of.

    Yields:
        how many frames were done at a time.

    Raises:
        UnreadableError: it is no video.
        OSError: a result cannot be written; none of the video's is then.
    """
    reader = VideoReader(task.image)
    frames, done = iter(reader), 0
    with ExitStack() as stack:
        writers = {}
        for output, path in task.results.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[output] = stack.enter_context(VideoWriter(path, reader.rate))
        while part := list(itertools.islice(frames, batch)):
            predictions = predictor.predict(part, confidence="confidence" in writers)
            for frame, prediction in zip(part, predictions, strict=True):
                for output, result in make_results(frame, prediction, predictor, writers).items():
                    writers[output].write(result)
            done += len(part)
            yield len(part)
    if done < reader.frames:
        tqdm.write(f"Warning: {task.image}: tells of {reader.frames} frames, {done} could be read", sys.stderr)
