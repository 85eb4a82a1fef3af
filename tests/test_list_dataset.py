"""List files: items, determinism, and one readable line for each kind of bad data."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from toy_data import NAMES, SIZE, write_toy_data

from pspnet_fast.data import DataError
from pspnet_fast.data.list_dataset import ListDataset, read_colors, read_image, read_names
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
    assert str(error.value) == (f"{path}: label value 7 (2 pixels outside the classes); allowed are 0..2 and 255")


def test_label_of_another_size(root: Path) -> None:
    path = break_label(root, 0, np.zeros((40, 47), np.uint8))
    with pytest.raises(DataError) as error:
        make(root)[0]
    assert str(error.value) == f"{path}: label of 47x40 pixels for an image of 48x40 pixels ({root / 'train_0.png'})"


def test_colour_label(root: Path) -> None:
    path = break_label(root, 0, np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(DataError, match=rf"{path}: a label must be a single-channel 8-bit .* got 3 channel\(s\)"):
        make(root)[0]


def test_file_that_is_no_image(root: Path) -> None:
    for content in (b"", b"no image"):
        (root / "train_1.png").write_bytes(content)
        with pytest.raises(DataError, match=r"train_1.png: is not an image that OpenCV can decode"):
            make(root)[1]


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


def test_list_names_missing_file_and_line(root: Path) -> None:
    (root / "train.txt").write_text("train_0.png train_0_label.png\n\ngone.png train_0_label.png\n")
    with pytest.raises(FileNotFoundError, match=r"train.txt:3: no file .*gone.png"):
        make(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [("train_0.png\n", r"train.txt:1: must be 'IMAGE LABEL', got 'train_0.png'"), ("\n", "names no image")],
)
def test_malformed_list(root: Path, content: str, message: str) -> None:
    (root / "train.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        make(root)


def test_names_and_colors(root: Path) -> None:
    assert read_names(root / "names.txt") == NAMES
    assert read_colors(root / "colors.txt", 3)[1] == (0, 255, 0)
    with pytest.raises(ValueError, match="has 3 colours for 4 classes"):
        read_colors(root / "colors.txt", 4)
    for line, message in (("1 2\n", "colors.txt:1: must be 'R G B'"), ("1 2 256\n", r"colours lie in 0\.\.255")):
        (root / "colors.txt").write_text(line)
        with pytest.raises(ValueError, match=message):
            read_colors(root / "colors.txt", 1)
    (root / "names.txt").write_text("\n")
    with pytest.raises(ValueError, match="must hold 1 to 255 class names, has 0"):
        read_names(root / "names.txt")


def test_image_path_with_other_characters(tmp_path: Path) -> None:
    path = tmp_path / "straße.png"
    path.write_bytes(cv2.imencode(".png", np.full((2, 2, 3), (1, 2, 3), np.uint8))[1].tobytes())
    assert read_image(path)[0, 0].tolist() == [3, 2, 1]
