"""What is said of a data set before training starts."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from toy_data import COLORS, NAMES, SIZE, write_toy_data

from pspnet_fast.data import DataError
from pspnet_fast.data.checks import check_classes, check_lists, check_normalisation
from pspnet_fast.data.labels import LabelReader
from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import EvalTransform


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_toy_data(tmp_path)


def check(root: Path, reader: LabelReader | None = None) -> list[str]:
    train_set, val_set = (
        ListDataset(root, root / f"{split}.txt", reader or LabelReader(len(NAMES)), EvalTransform())
        for split in ("train", "val")
    )
    return check_lists(train_set, val_set)


def set_labels(root: Path, *splits: str, values: tuple[int, ...]) -> None:
    label = np.resize(np.uint8(values), SIZE)
    for split in splits:
        for path in root.glob(f"{split}_*_label.png"):
            cv2.imwrite(str(path), label)


def test_good_lists_pass_in_silence(root: Path) -> None:
    assert check(root) == []


def test_bad_pairs_are_found_at_once(root: Path) -> None:
    cv2.imwrite(str(root / "val_2_label.png"), np.full(SIZE, 9, np.uint8))
    with pytest.raises(DataError, match=r"val_2_label.png: label value 9"):
        check(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_ignored(root: Path, split: str) -> None:
    set_labels(root, split, values=(255,))
    count = {"train": 8, "val": 3}[split]
    assert check(root) == [f"{root / split}.txt: every pixel of the {count} labels looked at is ignored"]


def test_masks_of_0_and_255(root: Path) -> None:
    set_labels(root, "train", "val", values=(0, 255))
    with pytest.raises(
        DataError, match=r'train.txt: .* 0 and 255 only, .*"data.remap=\{0: 0, 255: 1\}" makes it class 1'
    ):
        check(root)
    assert check(root, LabelReader(2, remap={0: 0, 255: 1})) == []
    assert check(root, LabelReader(2, remap={0: 0, 1: 1, 255: 255})) == []
    set_labels(root, "val", values=(0, 1, 255))  # then 255 is a border
    assert check(root) == []


def classes(root: Path, split: str, reader: LabelReader, names: list[str] = NAMES) -> list[str]:
    return check_classes(ListDataset(root, root / f"{split}.txt", reader, EvalTransform()), names)


def test_class_without_a_pixel(root: Path) -> None:
    reader = LabelReader(3)
    assert classes(root, "train", reader) == classes(root, "val", reader) == []
    set_labels(root, "train", values=(0, 2, 255, 255))
    [warning] = classes(root, "train", reader)
    assert warning == (
        f"{root / 'train.txt'}: no pixel is of class 1 (green) in its labels; 255 is ignored, as 50.0% of the pixels "
        'are: if it stands for that class, "data.remap={0: 0, 2: 2, 255: 1}"'
    )
    assert classes(root, "train", LabelReader(3, remap={0: 0, 2: 2, 255: 1})) == []
    set_labels(root, "val", values=(0,))
    assert classes(root, "val", reader) == [
        f"{root / 'val.txt'}: no pixel is of classes 1 (green), 2 (blue) in its labels"
    ]
    many = [f"c{index}" for index in range(9)]
    [warning] = classes(root, "val", LabelReader(9), many)
    assert "classes 1 (c1), 2 (c2), 3 (c3), 4 (c4), 5 (c5) and 3 more in" in warning
    set_labels(root, "val", values=(255,))  # of which check_lists tells
    assert classes(root, "val", reader) == []


def test_classes_are_looked_for_until_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_labels(root, "train", values=(0, 1))
    cv2.imwrite(str(root / "train_3_label.png"), np.full(SIZE, 2, np.uint8))
    cv2.imwrite(str(root / "train_5_label.png"), np.full(SIZE, 9, np.uint8))  # an error to whom reads it
    assert classes(root, "train", LabelReader(3)) == []
    monkeypatch.setattr("pspnet_fast.data.checks.SCAN", 2)  # the first and the last
    [warning] = classes(root, "train", LabelReader(3))
    assert warning.endswith("no pixel is of class 2 (blue) in 2 of its 8 labels")


def test_images_of_few_bits_in_16(root: Path) -> None:
    image = np.random.default_rng(0).integers(4096, size=(*SIZE, 3), dtype=np.uint16)
    image[0, 0] = 4095
    cv2.imwrite(str(root / "val_1.png"), image)
    assert check(root) == [
        f"{root / 'val_1.png'}: has 16 bits and no value above 4095, so that it is dark; if its white is 4095, scale "
        "it to 65535 (as 1 of 3 images looked at)"
    ]
    for good in (16 * image, np.uint8(image >> 8), np.zeros_like(image)):
        cv2.imwrite(str(root / "val_1.png"), good)
        assert check(root) == []


def test_labels_that_may_be_ade20ks(root: Path) -> None:
    set_labels(root, "train", "val", values=(0, 1, 149))
    assert "use data.labels=ade20k" in check(root, LabelReader(150))[0]
    assert check(root, LabelReader(150, "ade20k")) == []
    set_labels(root, "val", values=(0, 1, 149, 255))
    assert check(root, LabelReader(150)) == []


def test_palettes_in_the_colours_of_other_classes(root: Path) -> None:
    def paint(colors: list[tuple[int, int, int]]) -> None:
        label = Image.fromarray(np.resize(np.uint8([0, 1, 2]), SIZE))
        label.putpalette([channel for color in colors for channel in color])
        label.save(root / "train_0_label.png")

    reader = LabelReader(len(NAMES), colors=COLORS)
    assert check(root, reader) == []
    paint(COLORS[::-1])
    [warning] = check(root, reader)
    assert warning.startswith(f"{root / 'train_0_label.png'}: its palette has the colours of the classes, but at other")
    for colors in (COLORS, [(1, 1, 1), (2, 2, 2), (3, 3, 3)]):
        paint(colors)
        assert check(root, reader) == []


def test_grey_labels_show_no_colours_of_classes(root: Path) -> None:
    set_labels(root, "train", values=(0,))
    assert check(root, LabelReader(len(NAMES), colors=[COLORS[0], COLORS[1], (0, 0, 0)])) == []


def test_repeated_and_shared_images(root: Path) -> None:
    lines = (root / "train.txt").read_text().splitlines()
    (root / "train.txt").write_text("\n".join([*lines, *lines[:2], (root / "val.txt").read_text()]))
    repeated, shared = check(root)
    assert repeated == f"{root / 'train.txt'}: 2 of 13 lines name an image of a line before"
    assert shared.startswith("3 images stand in ")


def test_normalisation_in_0_to_255() -> None:
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    warnings = check_normalisation(mean, std)
    assert [warning.rpartition(": ")[2] for warning in warnings] == [
        "data.mean=[0.485,0.456,0.406]",
        "data.std=[0.229,0.224,0.225]",
    ]
    assert warnings[0].startswith("data.mean=[123.675,116.28,103.53] looks like values for 0..255")
    assert len(check_normalisation(mean, [0.229, 0.224, 0.225])) == 1
    assert check_normalisation(mean, [1, 1, 1])[1].endswith("data.std=[0.00392157,0.00392157,0.00392157]")
    assert check_normalisation([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) == []
    assert check_normalisation([0, 0, 0], [1, 1, 1]) == []
