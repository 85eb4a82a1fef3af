"""List files: items, determinism, and one readable line for each kind of bad data."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from toy_data import NAMES, SIZE, write_toy_data

from pspnet_fast.data import DataError
from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import EvalTransform, TrainTransform
from pspnet_fast.training.loading import train_loader, val_loader


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_toy_data(tmp_path)


def make(root: Path, seed: int = 0, crop: tuple[int, int] = (32, 32)) -> ListDataset:
    return ListDataset(root, root / "train.txt", len(NAMES), TrainTransform(crop), seed)


def test_items(root: Path) -> None:
    dataset = ListDataset(root, root / "val.txt", len(NAMES), EvalTransform())
    image, label = dataset[1]
    assert len(dataset) == 3
    assert (image.shape, image.dtype) == ((3, *SIZE), torch.float32)
    assert (label.shape, label.dtype) == (SIZE, torch.int64)
    assert set(label.flatten().tolist()) <= {0, 1, 2, 255}


def test_images_are_rgb(root: Path) -> None:
    image, label = make(root).read(0)
    assert image.dtype == np.float32
    for value in np.unique(label[label != 255]):
        assert image[label == value].mean(0).argmax() == value


def epoch_of(dataset: ListDataset, workers: int, epoch: int, seed: int = 0) -> torch.Tensor:
    dataset.set_epoch(epoch)
    return torch.cat([images for images, _ in train_loader(dataset, 2, workers, seed, epoch)])


def test_items_depend_on_seed_epoch_and_index_alone(root: Path) -> None:
    (root / "train.txt").write_text(2 * "train_0.png train_0_label.png\n")

    def item(seed: int, epoch: int, index: int) -> torch.Tensor:
        dataset = make(root, seed)
        dataset.set_epoch(epoch)
        return dataset[index][0]

    first = item(0, 1, 0)
    torch.rand(3)  # the global generator does not matter
    assert torch.equal(first, item(0, 1, 0))
    for other in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):
        assert not torch.equal(first, item(*other))


def test_epochs_do_not_depend_on_the_number_of_workers(root: Path) -> None:
    dataset = make(root)
    first = epoch_of(dataset, 0, epoch=1)
    assert torch.equal(first, epoch_of(dataset, 2, epoch=1))
    assert torch.equal(first, epoch_of(make(root), 1, epoch=1))
    assert not torch.equal(first, epoch_of(dataset, 0, epoch=2))


def test_loaders_leave_the_global_generator_alone(root: Path) -> None:
    state = torch.get_rng_state()
    epoch_of(make(root), 2, epoch=0)
    list(val_loader(make(root), 1, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_order_is_shuffled_and_drops_the_rest(root: Path) -> None:
    dataset = ListDataset(root, root / "train.txt", len(NAMES), EvalTransform())
    plain = torch.stack([image for image, _ in dataset])
    loaded = torch.cat([images for images, _ in train_loader(dataset, 3, 0, 0, 0)])
    assert len(loaded) == 6
    order = [int((plain == image).flatten(1).all(1).nonzero()[0]) for image in loaded]
    assert len(set(order)) == 6
    assert order != sorted(order)


def break_label(root: Path, index: int, label: np.ndarray) -> Path:
    path = root / f"train_{index}_label.png"
    cv2.imwrite(str(path), label)
    return path


def test_label_outside_the_classes(root: Path) -> None:
    label = np.zeros(SIZE, np.uint8)
    label[3, 4:6] = 7
    path = break_label(root, 2, label)
    with pytest.raises(DataError) as error:
        make(root)[2]
    assert str(error.value) == (
        f"{path}: label value 7 (2 pixels outside the classes); allowed are 0..2 and 255; "
        "the meaning of values is told by data.labels (index, from_one, ade20k, cityscapes, voc, camvid, cocostuff, "
        'color) or "data.remap={VALUE: CLASS}"'
    )


def test_label_of_another_size(root: Path) -> None:
    path = break_label(root, 0, np.zeros((40, 47), np.uint8))
    with pytest.raises(DataError) as error:
        make(root)[0]
    assert str(error.value) == f"{path}: label of 47x40 pixels for an image of 48x40 pixels ({root / 'train_0.png'})"


@pytest.mark.parametrize("orientation", ["auto", "turned", "stored"])
def test_label_of_another_size_than_a_turned_photograph(root: Path, orientation: str) -> None:
    tags = Image.Exif()
    tags[0x112] = 6
    Image.open(root / "train_0.png").save(root / "train_0.png", exif=tags)
    path = break_label(root, 0, np.zeros((20, 24), np.uint8))
    dataset = ListDataset(root, root / "train.txt", 3, EvalTransform(), orientation=orientation)
    with pytest.raises(DataError) as error:
        dataset[0]
    size = "48x40" if orientation == "stored" else "40x48"
    assert str(error.value) == (
        f"{path}: label of 24x20 pixels for an image of {size} pixels ({root / 'train_0.png'}: 48x40 pixels as stored, "
        f"which its EXIF orientation turns; data.orientation={orientation})"
    )


def test_file_that_vanished(root: Path) -> None:
    dataset = make(root)
    (root / "train_1.png").unlink()
    with pytest.raises(DataError, match=r"train_1.png: cannot be read \(No such file or directory\)"):
        dataset[1]


def test_worker_errors_are_one_readable_line(root: Path) -> None:
    break_label(root, 5, np.full(SIZE, 9, np.uint8))
    with pytest.raises(DataError) as error:
        list(train_loader(make(root), 2, 1, 0, 0))
    assert str(error.value).startswith(f"{root / 'train_5_label.png'}: label value 9")
    assert "\n" not in str(error.value)


def test_images_of_different_size_need_a_batch_of_one(root: Path) -> None:
    for suffix in ("", "_label"):
        path = root / f"val_1{suffix}.png"
        cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:30])
    dataset = ListDataset(root, root / "val.txt", len(NAMES), EvalTransform())
    assert len(list(val_loader(dataset, 1, 0))) == 3
    with pytest.raises(DataError, match=r"differ in size \(height, width\): \[\(30, 48\), \(40, 48\)\]"):
        list(val_loader(dataset, 3, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn_on", ["shown", "stored"])
def test_label_of_a_turned_photograph(tmp_path: Path, orientation: int, drawn_on: str) -> None:
    label = np.zeros((20, 30), np.uint8)
    label[:10, 15:] = 1
    tags = Image.Exif()
    tags[0x112] = orientation
    Image.fromarray(np.stack([200 * label] * 3, -1)).save(tmp_path / "photo.png", exif=tags)
    if drawn_on == "shown":
        label = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "photo.png")))[..., 0] // 200
    Image.fromarray(label).save(tmp_path / "label.png")
    (tmp_path / "list.txt").write_text("photo.png label.png")
    choices = ["turned" if drawn_on == "shown" else "stored"]
    if drawn_on == "shown" or orientation not in (2, 3, 4):  # of these the size does not tell how a label was drawn
        choices.append("auto")
    for choice in choices:
        dataset = ListDataset(tmp_path, tmp_path / "list.txt", 2, EvalTransform(), orientation=choice)
        image, read = dataset.read(0)
        np.testing.assert_array_equal(read, label)
        np.testing.assert_array_equal(image[..., 0], 200 * label)


def test_label_stored_with_the_orientation_of_its_photograph(tmp_path: Path) -> None:
    label = np.uint8([[0, 1, 1]])
    tags = Image.Exif()
    tags[0x112] = 2
    Image.fromarray(np.stack([200 * label] * 3, -1)).save(tmp_path / "photo.png", exif=tags)
    Image.fromarray(label).save(tmp_path / "label.png", exif=tags)
    (tmp_path / "list.txt").write_text("photo.png label.png")
    for choice in ("auto", "turned", "stored"):
        dataset = ListDataset(tmp_path, tmp_path / "list.txt", 2, EvalTransform(), orientation=choice)
        image, read = dataset.read(0)
        np.testing.assert_array_equal(image[..., 0], 200 * read)
    with pytest.raises(ValueError, match=r"orientation must be one of 'auto', 'turned', 'stored', got 'exif'"):
        ListDataset(tmp_path, tmp_path / "list.txt", 2, EvalTransform(), orientation="exif")
