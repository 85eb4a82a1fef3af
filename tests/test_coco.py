"""``pspnet-fast coco-labels``: polygons, run lengths and panoptic segments become labels that training reads."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from published_trees import SIZE, write_image
from toy_command import assert_one_line, run

from pspnet_fast.data.labels import LabelReader
from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import EvalTransform

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]  # class 0 is the cat
HEIGHT, WIDTH = SIZE


def box(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def write(folder: Path, annotations: list[dict], categories: list[dict] = CATEGORIES, images: int = 3) -> Path:
    entries = [
        {"id": 10 - index, "file_name": f"a/photo {index}.png", "height": HEIGHT, "width": WIDTH}
        for index in range(images)
    ]
    for entry in entries:
        write_image(folder / "images" / entry["file_name"])
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))
    return path


def convert(path: Path, *more: object):
    return run("coco-labels", path, "--images", path.parent / "images", "--out", path.parent / "out", *more)


def label_of(path: Path, index: int) -> np.ndarray:
    return cv2.imread(str(path.parent / f"out/labels/{path.stem}/a/photo {index}.png"), cv2.IMREAD_UNCHANGED)


def test_polygons_and_run_lengths(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    counts = [2 * HEIGHT, HEIGHT, 13 * HEIGHT]  # by columns: the third one
    path = write(tmp_path, [
        {"id": 1, "image_id": 10, "category_id": 3, "segmentation": box(4, 2, 8, 6), "iscrowd": 0},
        {"id": 2, "image_id": 10, "category_id": 7, "segmentation": box(2, 1, 12, 10), "iscrowd": 0},
        {"id": 3, "image_id": 9, "category_id": 7, "iscrowd": 1,
         "segmentation": {"size": list(SIZE), "counts": counts}},
        {"id": 4, "image_id": 9, "category_id": 3, "segmentation": box(0, 0, 5, 5), "iscrowd": 0},
    ])  # fmt: skip
    result = convert(path)
    assert result.exit_code == 0, result.output
    assert "2 labels of 2 classes" in result.stdout
    assert "1 images without an annotation" in result.stdout
    label = np.full(SIZE, 255)
    label[1:10, 2:12], label[2:6, 4:8] = 1, 0  # the smaller one on top
    np.testing.assert_array_equal(label_of(path, 0), label)
    label = np.full(SIZE, 255)
    label[:, 2], label[:5, :5] = 1, 0  # the crowd below, although it is smaller
    np.testing.assert_array_equal(label_of(path, 1), label)
    assert (tmp_path / "out/names.txt").read_text() == "cat\ndog\n"
    dataset = ListDataset(tmp_path / "out", tmp_path / "out/instances.txt", 2, EvalTransform())
    assert len(dataset) == 2  # names with blanks
    assert_one_line(convert(path), 2, "instances.txt exists: replace with --overwrite")

    result = convert(path, "--background", "rest", "--overwrite")
    assert_one_line(result, 1, "names.txt has other classes than")
    (tmp_path / "out/names.txt").unlink()
    result = convert(path, "--background", "rest", "--overwrite")
    assert "3 labels of 3 classes" in result.stdout
    assert set(label_of(path, 0).flat) == {0, 1, 2}
    assert set(label_of(path, 2).flat) == {0}


def write_panoptic(folder: Path, ids: np.ndarray, segments: list[dict], **category: object) -> Path:
    annotation = {"image_id": 10, "file_name": "photo 0.png", "segments_info": segments}
    path = write(folder, [annotation], [entry | category for entry in CATEGORIES], images=1)
    (folder / "segments").mkdir(exist_ok=True)
    pixels = np.stack([ids >> 16, ids >> 8 & 255, ids & 255], -1).astype(np.uint8)  # blue first
    cv2.imwrite(str(folder / "segments/photo 0.png"), pixels)
    return path


def test_panoptic_segments(tmp_path: Path) -> None:
    ids = np.zeros(SIZE, np.int64)
    ids[:4], ids[4:6], ids[6:8] = 3, 70000, 1 << 23
    segments = [{"id": 3, "category_id": 7}, {"id": 70000, "category_id": 3}, {"id": 1 << 23, "category_id": 7}]
    path = write_panoptic(tmp_path, ids, segments, color=[1, 2, 3])
    result = convert(path, "--segments", tmp_path / "segments")
    assert result.exit_code == 0, result.output
    expected = np.repeat([1, 0, 1, 255], [4, 2, 2, HEIGHT - 8])[:, None].repeat(WIDTH, 1)
    np.testing.assert_array_equal(label_of(path, 0), expected)
    assert (tmp_path / "out/colors.txt").read_text() == "1 2 3\n1 2 3\n"
    assert LabelReader(2)(tmp_path / "out/labels/instances/a/photo 0.png").shape == SIZE
    assert_one_line(convert(path, "--overwrite"), 1, "its annotations are panoptic", "--segments")
    path = write_panoptic(tmp_path, ids + 1, segments)
    result = convert(path, "--segments", tmp_path / "segments", "--overwrite")
    assert_one_line(
        result, 1, "1 images cannot be used: ", "photo 0.png: holds the segment 1, which instances.json does"
    )


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    for text, message in (
        ("{", "no COCO file"),
        ("[]", "no COCO file"),
        ('{"images": [], "annotations": []}', "no COCO file, which holds images, annotations and categories ('categ"),
        ('{"images": [], "annotations": [], "categories": []}', "must have 1 to 255 classes, has 0"),
    ):
        path.write_text(text)
        assert_one_line(convert(path), 1, message)
    same = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]
    assert_one_line(convert(write(tmp_path, [], same)), 1, "the class 'cat' is there twice")


def test_annotations_that_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    path = write(tmp_path, [
        {"id": 1, "image_id": 10, "category_id": 9, "segmentation": box(4, 2, 8, 6)},
        {"id": 2, "image_id": 9, "category_id": 3, "segmentation": "scribble"},
        {"id": 3, "image_id": 8, "category_id": 3, "segmentation": box(4, 2, 8, 6)},
    ])  # fmt: skip
    (tmp_path / "images/a/photo 2.png").unlink()
    result = convert(path)
    assert_one_line(result, 1, "3 images cannot be used", "no category 9 (annotation 1)",
                    "the segmentation of annotation 2 cannot be drawn", "no image ")  # fmt: skip
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "../photo 0.png"
    path.write_text(json.dumps(content))
    assert_one_line(convert(path, "--overwrite"), 1, "../photo 0.png is outside --images")
