"""Data sets as they are published: pairs, classes and colours of each layout, and what is said of missing files."""

from pathlib import Path

import numpy as np
import pytest
from published_trees import CAMVID_FRAMES, SIZE, TREES, write_image, write_label

from pspnet_fast.cli.common import pair_dataset, read_classes
from pspnet_fast.data.conventions import CLASSES, classes_by_color
from pspnet_fast.data.layouts import LAYOUTS, read_published_classes
from pspnet_fast.data.list_dataset import PairDataset
from pspnet_fast.data.transforms import EvalTransform
from pspnet_fast.training.config import ConfigError, DataConfig
from pspnet_fast.training.config_file import load_config

CONFIGS = Path(__file__).parent.parent / "configs"


def open_set(root: Path, part: str, **settings: object) -> PairDataset:
    data = DataConfig(root=str(root), **settings)  # type: ignore[arg-type]
    return pair_dataset(data, part, len(read_classes(data)[0]), EvalTransform())


def stems(dataset: PairDataset) -> list[str]:
    return [image.stem for image, _ in dataset.pairs]


EXPECTED = {  # layout: images of train and val, classes of the four pixels that each label repeats
    "cityscapes": (4, 2, [255, 0, 1, 18]),
    "ade20k": (4, 2, [255, 0, 1, 149]),
    "voc": (3, 2, [0, 1, 20, 255]),
    "voc_aug": (4, 2, [0, 1, 20, 255]),
    "camvid": (4, 2, [0, 1, 10, 255]),
    "camvid_full": (5, 2, [0, 1, 10, 255]),
    "camvid_31": (5, 2, [0, 1, 30, 255]),
    "cocostuff": (4, 2, [0, 10, 11, 170]),
    "cocostuff10k": (4, 2, [255, 0, 1, 170]),
    "folders": (4, 2, [0, 1, 255, 255]),
}


def test_every_layout_is_tested() -> None:
    assert set(EXPECTED) == set(TREES) == set(LAYOUTS)


@pytest.mark.parametrize("layout", EXPECTED)
def test_pairs_and_classes(tmp_path: Path, layout: str) -> None:
    TREES[layout](tmp_path)
    train, val, classes = EXPECTED[layout]
    for part, count in (("train", train), ("val", val)):
        dataset = open_set(tmp_path, part, layout=layout)
        assert len(dataset) == count
        for image, label in dataset.pairs:
            assert image.stem.split("_left")[0] in label.stem
    image, label = open_set(tmp_path, "train", layout=layout).read(0)
    assert image.shape == (*SIZE, 3)
    assert label.ravel()[:4].tolist() == classes


@pytest.mark.parametrize(("layout", "first", "last", "color"), [
    ("cityscapes", "road", "bicycle", (119, 11, 32)),
    ("ade20k", "wall", "flag", (92, 0, 255)),
    ("voc", "background", "tvmonitor", (0, 64, 128)),
    ("camvid", "sky", "bicyclist", (0, 128, 192)),
    ("camvid_31", "Animal", "Wall", (64, 192, 0)),
    ("cocostuff", "person", "wood", None),
])  # fmt: skip
def test_names_and_colours(tmp_path: Path, layout: str, first: str, last: str, color: tuple | None) -> None:
    names, colors = read_published_classes(layout)
    assert (names[0], names[-1], colors and colors[-1]) == (first, last, color)
    assert len(set(names)) == len(names) == CLASSES.get(layout, 31)
    TREES[layout](tmp_path)
    data = DataConfig(root=str(tmp_path), layout=layout)
    assert read_classes(data)[0] == names
    assert len(read_classes(data)[1]) == len(names)
    (tmp_path / "names.txt").write_text("\n".join(f"c{index}" for index in range(len(names))))
    assert read_classes(data)[0][0] == "c0"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_read_their_layout(tmp_path: Path, path: Path) -> None:
    config = load_config(path, [f"data.root={tmp_path}"])
    if config.data.layout is None:
        assert path.stem == "camvid"
        return
    TREES[config.data.layout](tmp_path)
    names, _ = read_classes(config.data)
    for part in ("train", "val"):
        dataset = pair_dataset(config.data, part, len(names), EvalTransform())
        assert dataset.read(len(dataset) - 1)[1].min() < len(names)


def test_colours_of_voc_are_those_of_its_bits() -> None:
    bits = np.arange(21)[:, None] >> np.arange(3)
    expected = sum((bits >> 3 * digit & 1) << (7 - digit) for digit in range(3))
    assert read_published_classes("voc")[1] == [tuple(row) for row in expected.tolist()]


def test_cityscapes_in_its_other_forms(tmp_path: Path) -> None:
    TREES["cityscapes"](tmp_path)
    dataset = open_set(tmp_path, "val", layout="cityscapes", labels="index")
    assert dataset.pairs[0][1].name == "lindau_000000_000000_gtFine_labelTrainIds.png"
    assert dataset.read(0)[1].ravel()[:4].tolist() == [255, 0, 1, 18]
    (tmp_path / "names.txt").write_text("road\n")
    dataset = open_set(tmp_path, "train", layout="cityscapes", remap={7: 0, "other": 255}, train_split="train+val")
    assert len(dataset) == 6
    assert dataset.read(0)[1].ravel()[:4].tolist() == [255, 0, 255, 255]
    (tmp_path / "names.txt").unlink()
    write_image(tmp_path / "leftImg8bit/train_extra/ulm/ulm_0_0_leftImg8bit.png")
    write_label(tmp_path / "gtCoarse/train_extra/ulm/ulm_0_0_gtCoarse_labelIds.png", [7])
    assert len(open_set(tmp_path, "train", layout="cityscapes", train_split="train_extra")) == 1


def test_voc_with_the_additional_annotations(tmp_path: Path) -> None:
    TREES["voc_aug"](tmp_path)
    derived = stems(open_set(tmp_path, "train", layout="voc_aug"))
    assert derived == ["2007_000032", "2007_000039", "2008_1", "2010_000001"]
    val = open_set(tmp_path, "val", layout="voc_aug")
    assert val.pairs[0][1].parent.name == "SegmentationClassAug"
    lines = "/JPEGImages/2010_000001.jpg /SegmentationClassAug/2010_000001.png\n2008_1\n"
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text(lines)
    assert stems(open_set(tmp_path, "train", layout="voc_aug")) == ["2010_000001", "2008_1"]


def test_camvid_with_its_void_as_a_class(tmp_path: Path) -> None:
    names, colors = read_published_classes("camvid_31")
    assert set(colors) | {(0, 0, 0)} == set(classes_by_color("camvid"))
    TREES["camvid_31"](tmp_path)
    (tmp_path / "names.txt").write_text("\n".join([*names, "Void"]))
    (tmp_path / "colors.txt").write_text("".join("{} {} {}\n".format(*color) for color in [*colors, (0, 0, 0)]))
    dataset = open_set(tmp_path, "train", layout="camvid_31", labels="color", remap={"0 0 0": 31})
    assert dataset.read(0)[1].ravel()[:4].tolist() == [0, 1, 30, 31]


@pytest.mark.parametrize("split", CAMVID_FRAMES)
def test_camvid_is_split_by_its_sequences(tmp_path: Path, split: str) -> None:
    TREES["camvid_full"](tmp_path)
    assert stems(open_set(tmp_path, "val", layout="camvid_full", val_split=split)) == CAMVID_FRAMES[split]
    with pytest.raises(ValueError, match=r"CamVid has the splits train, val and test, got 'valid'"):
        open_set(tmp_path, "val", layout="camvid_full", val_split="valid")


def test_folders_of_ones_own(tmp_path: Path) -> None:
    TREES["folders"](tmp_path)
    (tmp_path / "images").rename(tmp_path / "photos")
    (tmp_path / "labels").rename(tmp_path / "masks")
    for path in tmp_path.glob("masks/*/*/*.png"):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    own = {"layout": "folders", "images": "photos/{split}/{name}.*", "label_files": "masks/{split}/{name}_mask.png"}
    assert stems(open_set(tmp_path, "val", **own)) == ["photo 0", "photo 1"]
    own = {"layout": "folders", "images": "photos/{name}.*", "label_files": "masks/{name}_mask.png"}
    with pytest.raises(FileNotFoundError, match=r"no list .*train.txt, which would tell the images of 'train'"):
        open_set(tmp_path, "train", **own)
    (tmp_path / "train.txt").write_text("val/a street/photo 1\ntrain/a street/photo 0.jpg\n")
    assert stems(open_set(tmp_path, "train", **own)) == ["photo 1", "photo 0"]
    (tmp_path / "train.txt").write_text("val/a street/photo 9\n")
    with pytest.raises(ValueError, match=r"train.txt:1: no image or label of the name 'val/a street/photo 9'"):
        open_set(tmp_path, "train", **own)


def test_split_above_images_and_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "train/images/a.tif")
    write_label(tmp_path / "train/labels/a.png", [1])
    (tmp_path / "names.txt").write_text("road\nsky\n")
    assert stems(open_set(tmp_path, "train", layout="folders")) == ["a"]


def test_labels_in_the_folders_may_have_any_meaning(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.png")
    write_label(tmp_path / "labels/train/a.png", [0, 1, 2, 255])
    (tmp_path / "names.txt").write_text("road\nsky\n")
    label = open_set(tmp_path, "train", layout="folders", labels="from_one").read(0)[1]  # reduce_zero_label elsewhere
    assert label.ravel()[:4].tolist() == [255, 0, 1, 255]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image images/training/\*.jpg"):
        open_set(tmp_path, "train", layout="ade20k")
    TREES["ade20k"](tmp_path)
    (tmp_path / "annotations/training/ADE_train_00000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"ADE_train_00000002.jpg: this image has no label; .* check-data"):
        open_set(tmp_path, "train", layout="ade20k")
    (tmp_path / "annotations/training/ADE_train_00000003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no label and 1 more images have none"):
        open_set(tmp_path, "train", layout="ade20k")
    (tmp_path / "images/validation/ADE_val_00000001.jpg").unlink()  # a label too many does no harm
    assert len(open_set(tmp_path, "val", layout="ade20k")) == 1
    write_image(tmp_path / "v/JPEGImages/x.jpg")
    TREES["voc"](tmp_path / "v")
    (tmp_path / "v/JPEGImages/2008_1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"SegmentationClass/2008_1.png: this label has no image"):
        open_set(tmp_path / "v", "train", layout="voc")


def test_two_images_of_one_name(tmp_path: Path) -> None:
    for suffix in (".jpg", ".png"):
        write_image(tmp_path / f"images/train/a{suffix}")
    (tmp_path / "names.txt").write_text("road\n")
    with pytest.raises(ValueError, match=r"a.jpg and .*a.png have one name: which of them is meant\?"):
        open_set(tmp_path, "train", layout="folders")


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    TREES["ade20k"](tmp_path)
    with pytest.raises(ValueError, match=r"data.labels must be one of ade20k for this data.layout, got 'index'"):
        open_set(tmp_path, "train", layout="ade20k", labels="index")
    with pytest.raises(ValueError, match=r"must hold \{name\} once, got 'images'"):
        open_set(tmp_path, "train", layout="ade20k", images="images")
    with pytest.raises(ConfigError, match=r"data.layout must be one of 'cityscapes', .*'folders', got 'ade'"):
        DataConfig(layout="ade")
    with pytest.raises(ConfigError, match=r"data.train_split must be null without a data.layout"):
        DataConfig(train_split="train")
    assert DataConfig().labels == DataConfig(layout="folders").labels == "index"
    assert DataConfig(layout="voc").labels == "voc"
