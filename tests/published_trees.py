"""Small data sets in the folders in which the large ones are published: random photographs and labels."""

import itertools
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = (12, 16)  # height, width


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(256, size=(*SIZE, 3)).astype(np.uint8)
    assert cv2.imwrite(str(path), picture)


def write_label(path: Path, values: list[int] | np.ndarray, palette: bool = False) -> None:
    """A label with these values in turn, or with these colours (N, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values, np.uint8)
    pixels = values[np.arange(SIZE[0] * SIZE[1]) % len(values)].reshape(*SIZE, *values.shape[1:])
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette([channel for index in range(256) for channel in (index, 255 - index, 7)])
    image.save(path)


def cityscapes(root: Path) -> None:
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        for frame in range(2):
            stem = f"{city}_000000_{frame:06}"
            write_image(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", frame)
            write_label(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", [0, 7, 8, 33])
            write_label(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelTrainIds.png", [255, 0, 1, 18])
            write_label(root / f"gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png", [99])


def ade20k(root: Path) -> None:
    for split, short, count in (("training", "train", 4), ("validation", "val", 2)):
        for index in range(1, count + 1):
            write_image(root / f"images/{split}/ADE_{short}_{index:08}.jpg", index)
            write_label(root / f"annotations/{split}/ADE_{short}_{index:08}.png", [0, 1, 2, 150])


def voc(root: Path, aug: bool = False) -> None:
    names = {"train": ["2007_000032", "2007_000039", "2008_1"], "val": ["2007_000033", "2007_000042"]}
    for name in (*names["train"], *names["val"], "2009_boxes_only"):
        write_image(root / f"JPEGImages/{name}.jpg", int(name[3:4]))
    for split, stems in names.items():
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            write_label(root / f"SegmentationClass/{stem}.png", [0, 1, 20, 255], palette=True)
    if aug:
        write_image(root / "JPEGImages/2010_000001.jpg")
        write_label(root / "SegmentationClassAug/2010_000001.png", [0, 2, 255, 255])
        write_label(root / "SegmentationClassAug/2007_000033.png", [0, 3, 255, 255])


def camvid(root: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for index in range(count):
            write_image(root / f"{split}/0001TP_{index:06}.png", index)
            write_label(root / f"{split}annot/0001TP_{index:06}.png", [0, 1, 10, 11])


CAMVID_FRAMES = {
    "train": ["0001TP_006690", "0001TP_008520", "0006R0_f00930", "0016E5_00390", "0016E5_08640"],
    "val": ["0016E5_07959", "0016E5_08159"],
    "test": ["0001TP_008550", "Seq05VD_f00000"],
}


def camvid_full(root: Path) -> None:
    colors = np.array([(128, 128, 128), (192, 0, 128), (192, 0, 192), (0, 0, 0)])  # Sky, Archway, Motorcycle..., Void
    for name in itertools.chain(*CAMVID_FRAMES.values()):
        write_image(root / f"701_StillsRaw_full/{name}.png")
        write_label(root / f"LabeledApproved_full/{name}_L.png", colors)


def camvid_31(root: Path) -> None:
    colors = np.array([(64, 128, 64), (192, 0, 128), (64, 192, 0), (0, 0, 0)])  # Animal, Archway, Wall, Void
    for name in itertools.chain(*CAMVID_FRAMES.values()):
        write_image(root / f"images/{name}.png")
        write_label(root / f"labels/{name}_L.png", colors)


def cocostuff10k(root: Path) -> None:
    for split, count in (("train2014", 4), ("test2014", 2)):
        for index in range(count):
            stem = f"COCO_train2014_{index:012}"
            write_image(root / f"images/{split}/{stem}.jpg", index)
            write_label(root / f"annotations/{split}/{stem}_labelTrainIds.png", [0, 1, 2, 171])


def cocostuff(root: Path) -> None:
    for split, count in (("train2017", 4), ("val2017", 2)):
        for index in range(count):
            write_image(root / f"{split}/{index:012}.jpg", index)
            write_label(root / f"stuffthingmaps/{split}/{index:012}.png", [0, 10, 12, 181])


def folders(root: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            write_image(root / f"images/{split}/a street/photo {index}{('.jpg', '.png')[index % 2]}", index)
            write_label(root / f"labels/{split}/a street/photo {index}.png", [0, 1, 255, 255])
    (root / "images/train/notes.txt").write_text("no image")
    (root / "names.txt").write_text("road\nsky\n")


def voc_aug(root: Path) -> None:
    voc(root, aug=True)


TREES = {
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "voc": voc,
    "voc_aug": voc_aug,
    "camvid": camvid,
    "camvid_full": camvid_full,
    "camvid_31": camvid_31,
    "cocostuff": cocostuff,
    "cocostuff10k": cocostuff10k,
    "folders": folders,
}
