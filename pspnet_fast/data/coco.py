"""COCO's JSON files, polygons and run lengths or panoptic segments, as one label image a photograph."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pspnet_fast.data import IGNORE_INDEX, DataError
from pspnet_fast.data.labels import Label, read_pixels
from pspnet_fast.data.lists import Color


class CocoFile:
    """A file of annotations: which photographs it has, and the label of each.

    Classes are the categories by ascending id, after ``background`` if that is given: the class of all pixels that no
    annotation covers, which else are 255. Where segments overlap the smaller lies on top, and crowds below all others.

    Args:
        path: JSON of instances (``segmentation`` as polygons or run lengths) or panoptic (``segments_info``).
        segments: folder of the PNG files of a panoptic file.

    Attributes:
        names: of the classes.
        colors: of the classes, if all categories have one.

    Raises:
        ValueError: no JSON of this form, no category or more than 255 classes, a name twice, or panoptic segments
            without their folder.
    """

    def __init__(self, path: Path, background: str | None = None, segments: Path | None = None) -> None:
        try:
            self._content = json.loads(path.read_text(encoding="utf-8"))
            images, annotations, categories = (self._content[key] for key in ("images", "annotations", "categories"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: no COCO file, which holds images, annotations and categories ({error})"
            ) from None
        self.path, self._segments = path, segments
        self.images: list[Mapping[str, Any]] = sorted(images, key=lambda image: image["id"])
        self.panoptic = any("segments_info" in annotation for annotation in annotations)
        if self.panoptic and segments is None:
            raise ValueError(f"{path}: its annotations are panoptic; name the folder of their PNG files (--segments)")
        self._background = background is not None
        categories = sorted(categories, key=lambda category: category["id"])
        self.names = [*([background] if background is not None else []), *(entry["name"] for entry in categories)]
        if twice := next((name for name in self.names if self.names.count(name) > 1), None):
            raise ValueError(f"{path}: the class {twice!r} is there twice")
        if not categories or len(self.names) > IGNORE_INDEX:
            raise ValueError(f"{path}: must have 1 to {IGNORE_INDEX} classes, has {len(self.names)}")
        start = int(self._background)
        self._classes = {entry["id"]: index for index, entry in enumerate(categories, start)}
        colored = all("color" in entry for entry in categories)
        given = [tuple(entry["color"]) for entry in categories] if colored else []
        self.colors: list[Color] | None = [(0, 0, 0)] * start + given if colored else None

    def labels(self) -> Iterator[tuple[Mapping[str, Any], Label | DataError]]:
        """Every image's entry and its label uint8 (H, W), or why it has none."""
        read = self._read_panoptic if self.panoptic else self._polygon_reader()
        by_image = {annotation["image_id"]: annotation for annotation in self._content["annotations"]}
        for image in self.images:
            try:
                yield image, read(image, by_image.get(image["id"], {}))
            except DataError as error:
                yield image, error

    def _empty(self, size: Sequence[int]) -> Label:
        return np.full(size, 0 if self._background else IGNORE_INDEX, np.uint8)

    def _class(self, entry: Mapping[str, Any]) -> int:
        try:
            return self._classes[entry["category_id"]]
        except KeyError:
            raise DataError(
                f"{self.path}: no category {entry.get('category_id')} (annotation {entry.get('id')})"
            ) from None

    def _read_panoptic(self, image: Mapping[str, Any], annotation: Mapping[str, Any]) -> Label:
        if not annotation:
            raise DataError(f"{self.path}: {image['file_name']} has no annotation")
        assert self._segments is not None
        path = self._segments / annotation["file_name"]
        pixels = read_pixels(path, expand_palette=True)
        ids = pixels.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
        classes = {entry["id"]: self._class(entry) for entry in annotation["segments_info"]}
        known, place = np.unique(ids, return_inverse=True)
        if strange := [number for number in known.tolist() if number and number not in classes]:
            raise DataError(f"{path}: holds the segment {strange[0]}, which {self.path.name} does not name")
        nothing = 0 if self._background else IGNORE_INDEX
        table = np.array([classes.get(number, nothing) for number in known.tolist()], np.uint8)
        return table[place].reshape(ids.shape)

    def _polygon_reader(self) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Label]:
        from pycocotools.coco import COCO

        with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
            index = COCO()
            index.dataset = self._content
            index.createIndex()

        def read(image: Mapping[str, Any], _: Mapping[str, Any]) -> Label:
            label = self._empty((image["height"], image["width"]))
            entries = index.loadAnns(index.getAnnIds(imgIds=image["id"]))
            masks = [(entry, _mask(index, entry, self.path)) for entry in entries]
            for entry, mask in sorted(masks, key=lambda pair: (not pair[0].get("iscrowd"), -int(pair[1].sum()))):
                label[mask] = self._class(entry)
            return label

        return read


def _mask(index: Any, entry: Mapping[str, Any], path: Path) -> NDArray[np.bool_]:
    try:
        return index.annToMask(entry).astype(bool)
    except Exception as error:  # pycocotools raises what it comes across in an odd segmentation
        raise DataError(f"{path}: the segmentation of annotation {entry.get('id')} cannot be drawn ({error})") from None
