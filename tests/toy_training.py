"""Training runs of a toy network, for the tests of the trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from toy_backbone import ToyBackbone
from toy_data import NAMES

from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import EvalTransform, TrainTransform
from pspnet_fast.models import PSPNet
from pspnet_fast.training import TrainConfig, TrainResult, evaluate, fit

CONFIG = TrainConfig(epochs=4, batch_size=2, workers=0, device="cpu", log_every=3, lr=0.02, head_lr_factor=2.0)


def train(
    root: Path,
    out: Path,
    config: TrainConfig = CONFIG,
    dataset: type[ListDataset] = ListDataset,
    train_list: str = "train.txt",
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, TrainResult]:
    torch.manual_seed(config.seed)
    model = model or PSPNet(len(NAMES), ToyBackbone(), bins=(1, 2))
    train_set = dataset(root, root / train_list, len(NAMES), TrainTransform((33, 41), scale=(0.8, 1.2)), config.seed)
    val_set = ListDataset(root, root / "val.txt", len(NAMES), EvalTransform())
    return model, fit(model, train_set, val_set, config, out, class_names=NAMES, **options)


def assert_equal_states(first: Any, second: Any) -> None:
    """Same nested plain data, tensors bit for bit; wall-clock entries aside."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds", "images_per_second", "times"}:
            assert_equal_states(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal_states(one, other)
    else:
        assert first == second or (first != first and second != second)


class Items(Dataset[tuple[Tensor, Tensor]]):
    """Items of one value each, with one label everywhere."""

    def __init__(self, count: int, label: int = 0) -> None:
        self.count, self.label = count, label

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((3, 16, 16), float(index)), torch.full((16, 16), self.label)


def give_scores(monkeypatch: pytest.MonkeyPatch, *mious: float) -> None:
    """Makes the validations of a training find these mIoU, one after the other."""
    scores = iter(mious)

    def scored(*arguments: Any, **options: Any) -> Any:
        metrics = evaluate(*arguments, **options)
        miou = next(scores)
        monkeypatch.setattr(type(metrics), "miou", property(lambda _: miou))
        return metrics

    monkeypatch.setattr("pspnet_fast.training.run.evaluate", scored)
