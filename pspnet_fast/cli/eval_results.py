"""The files that ``pspnet-fast eval`` leaves in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspnet_fast.data.images import Image, to_float
from pspnet_fast.data.labels import Label
from pspnet_fast.data.list_dataset import PairDataset
from pspnet_fast.inference.evaluation_pictures import draw_confusion, error_map, save_jpeg
from pspnet_fast.inference.plan import check_results
from pspnet_fast.inference.render import Color, colorize, overlay, save_png
from pspnet_fast.inference.sliding import Segmenter
from pspnet_fast.training.score_files import ranked, write_scores

_FILES = ("scores.json", "classes.csv", "images.csv", "confusion.png")
_GALLERY = {"image": "jpg", "truth": "png", "prediction": "png", "error": "png"}


class Results:
    """Where the files lie, and how they are written.

    Args:
        out: folder of all of them.
        val_set: gives pairs of image (H, W, 3) and label (H, W) as they are.
        names: of its images, whose folders those of the predictions follow.
        colors: of the classes.
        kinds: which of "labels", "colors" and "overlays" to write for every image.
    """

    def __init__(
        self, out: Path, val_set: PairDataset, names: Sequence[str], colors: Sequence[Color], kinds: Sequence[str]
    ) -> None:
        self.out, self._val_set, self._colors = out, val_set, colors
        # A name that leads out of the data's folder would lead out of ours.
        inner = [Path(name) if _stays(name) else Path(Path(name).name) for name in names]
        self._saved = {kind: [out / kind / name.with_suffix(".png") for name in inner] for kind in kinds}

    def check(self, overwrite: bool) -> None:
        """Refuse to write over an image, a label, or, unless ``overwrite``, over results.

        Raises:
            ValueError: the message names the files and the way out.
        """
        pairs = self._val_set.pairs
        results = [(image, paths[index]) for paths in self._saved.values() for index, (image, _) in enumerate(pairs)]
        own = [(pairs[0][0], self.out / name) for name in (*_FILES, "gallery")] if pairs else []
        check_results([*own, *results], inputs=[path for pair in pairs for path in pair], overwrite=overwrite)

    def save(self, index: int, image: Image, prediction: Label) -> None:
        """Write the prediction of one image."""
        for kind, paths in self._saved.items():
            picture: Any = prediction
            if kind == "colors":
                picture = colorize(prediction, self._colors)
            elif kind == "overlays":
                picture = overlay(to_float(image).astype(np.uint8), prediction, self._colors)
            paths[index].parent.mkdir(parents=True, exist_ok=True)
            save_png(paths[index], picture)

    def write(self, record: dict[str, Any], segmenter: Segmenter, gallery: int) -> None:
        """Write the scores, the confusion matrix, and the ``gallery`` best, median and worst images, which it records.

        Raises:
            OSError: a file cannot be written; the message names it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        folder = self.out / "gallery"
        for kind, suffix in _GALLERY.items():  # those of an evaluation before
            for path in folder.glob(f"*_{kind}.{suffix}"):
                path.unlink()
        record["gallery"] = [
            self._picture(record["images"][index], rank, index, segmenter) for rank, index in ranked(record, gallery)
        ]
        draw_confusion(np.asarray(record["confusion"]), record["classes"], self.out / "confusion.png")
        write_scores(record, self.out)

    def _picture(self, scored: dict[str, Any], rank: str, index: int, segmenter: Segmenter) -> dict[str, Any]:
        """Draw one image of the gallery, and tell about it."""
        image, label = (tensor.numpy() for tensor in self._val_set[index])
        prediction = segmenter([image])[0][0].cpu().numpy()
        shown = to_float(image).astype(np.uint8)
        pictures = {
            "image": shown,
            "truth": colorize(label, self._colors),
            "prediction": colorize(prediction, self._colors),
            "error": error_map(shown, label, prediction),
        }
        stem = f"{index:05d}_{Path(scored['image']).stem}"
        files = {kind: f"gallery/{stem}_{kind}.{suffix}" for kind, suffix in _GALLERY.items()}
        (self.out / "gallery").mkdir(exist_ok=True)
        for kind, name in files.items():
            (save_jpeg if kind == "image" else save_png)(self.out / name, pictures[kind])
        return {"rank": rank, "image": scored["image"], "miou": scored["miou"], "files": files}


def _stays(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts
