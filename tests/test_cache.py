"""The cache of decoded pairs: the same items, in bounded memory, for all processes; and pairs that are unreadable."""

from pathlib import Path

import numpy as np
import pytest
import torch
from published_trees import write_label
from toy_command import CONFIG, run
from toy_data import NAMES, SIZE, write_toy_data

from pspnet_fast.data import DataError, UnreadableError
from pspnet_fast.data.cache import Cache
from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import EvalTransform, TrainTransform
from pspnet_fast.training.loading import train_loader, val_loader

PAIR = 4 * SIZE[0] * SIZE[1]  # bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_toy_data(tmp_path)


def make(root: Path, **more: object) -> ListDataset:
    return ListDataset(root, root / "train.txt", len(NAMES), TrainTransform((32, 32)), **more)


def epoch_of(dataset: ListDataset, workers: int, epoch: int) -> torch.Tensor:
    dataset.set_epoch(epoch)
    return torch.cat([images for images, _ in train_loader(dataset, 2, workers, 0, epoch)])


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_the_same_and_files_are_read_once(root: Path, workers: int) -> None:
    expected = [epoch_of(make(root), 0, epoch) for epoch in range(2)]
    dataset = make(root, cache_bytes=8 * PAIR)
    assert torch.equal(epoch_of(dataset, workers, 0), expected[0])
    assert len(dataset._cache) == 8
    for path in root.glob("*.png"):
        path.unlink()
    assert torch.equal(epoch_of(dataset, workers, 1), expected[1])  # in other processes, where there are some


def test_memory_is_bounded(root: Path) -> None:
    expected = epoch_of(make(root), 0, 1)
    dataset = make(root, cache_bytes=4 * PAIR - 1)
    for epoch in range(2):
        last = epoch_of(dataset, 0, epoch)
    assert len(dataset._cache) == 3
    assert torch.equal(last, expected)


def test_kept_pairs() -> None:
    cache = Cache(1000, 3)
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(65536, size=(5, 7, 3)).astype(np.uint16), rng.integers(256, size=(5, 7)).astype(np.uint8)),
        (rng.integers(256, size=(3, 3, 3)).astype(np.uint8), rng.integers(256, size=(3, 3)).astype(np.uint8)),
    ]
    for index, pair in enumerate(pairs):
        cache.put(index, *pair)
        cache.put(index, *pairs[0])  # the first stays
    for index, pair in enumerate(pairs):
        for kept, array in zip(cache.get(index), pair, strict=True):
            assert kept.dtype == array.dtype
            np.testing.assert_array_equal(kept, array)
            with pytest.raises(ValueError, match="read-only"):
                kept[0] = 0
    assert cache.get(2) is None
    cache.put(2, np.zeros((30, 30, 3), np.uint8), np.zeros((30, 30), np.uint8))
    assert cache.get(2) is None


def test_more_memory_than_there_is(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data.cache_gb asks for 1e\+06 GB of shared memory, .* GB free"):
        make(root, cache_bytes=10**15)


def damage(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:60])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_pair_stands_for_an_unreadable_one(
    root: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(root, "train_1.png", "train_2_label.png")
    dataset = make(root, unreadable="replace")
    for epoch in range(2):
        assert len(epoch_of(dataset, workers, epoch)) == 8
    assert [image.name for image, _ in dataset.skipped] == ["train_1.png", "train_2.png"]
    said = capfd.readouterr().err
    assert [said.count(f"passed over: {root / name}: ") for name in ("train_1.png", "train_2_label.png")] == [1, 1]
    plain = ListDataset(root, root / "train.txt", len(NAMES), EvalTransform(), unreadable="replace")
    assert torch.equal(plain[1][0], plain[3][0])
    with pytest.raises(UnreadableError, match=r"train_1.png: is not an image"):
        epoch_of(make(root), workers, 0)


def test_blank_images_do_not_count_in_validation(root: Path) -> None:
    damage(root, "train_1.png", "train_2_label.png", "train_3.png", "train_3_label.png")
    dataset = ListDataset(root, root / "train.txt", len(NAMES), EvalTransform(), unreadable="blank")
    labels = [label for _, label in val_loader(dataset, 1, 0)]
    assert [(label == 255).all().item() for label in labels] == [index in (1, 2, 3) for index in range(8)]
    assert [tuple(label.shape[1:]) for label in labels[:4]] == [SIZE, SIZE, SIZE, (64, 64)]
    assert len(dataset.skipped) == 3


def test_what_is_not_damaged_is_still_an_error(root: Path) -> None:
    write_label(root / "train_1_label.png", [9])
    dataset = make(root, unreadable="replace")
    with pytest.raises(DataError, match=r"train_1_label.png: label of|train_1_label.png: label value"):
        dataset[1]
    for index in range(8):
        damage(root, f"train_{index}.png")
    with pytest.raises(UnreadableError):
        dataset[0]
    with pytest.raises(ValueError, match=r"unreadable must be one of 'error', 'replace', 'blank', got 'skip'"):
        make(root, unreadable="skip")


@pytest.mark.usefixtures("one_thread")
def test_training_skips_and_counts(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data")
    damage(data, "train_3.png", "val_1_label.png")
    (tmp_path / "toy.yaml").write_text(CONFIG)
    arguments = ("train", tmp_path / "toy.yaml", f"data.root={data}", "--out", tmp_path / "run")
    assert run(*arguments).exit_code == 1
    result = run(*arguments, "data.unreadable=skip", "data.cache_gb=0.001")
    assert result.exit_code == 0, result.output
    named = ", ".join(str(data / name) for name in ("train_3.png", "val_1.png"))
    assert f"Warning: skipped 2 unreadable pairs: {named}" in result.stderr
    result = run("eval", *arguments[1:3], "data.unreadable=skip", "--checkpoint", tmp_path / "run/checkpoint.pt")
    assert f"Warning: skipped 1 unreadable pairs: {data / 'val_1.png'}" in result.stderr
