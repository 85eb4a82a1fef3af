"""The default protocol is semseg's: the same losses as a plain transcription of its training step."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_backbone import ToyBackbone
from toy_data import NAMES, write_toy_data
from toy_training import CONFIG, train

from pspnet_fast.data.list_dataset import ListDataset
from pspnet_fast.data.transforms import TrainTransform
from pspnet_fast.models import PSPNet
from pspnet_fast.training import TrainConfig
from pspnet_fast.training.loading import train_loader
from pspnet_fast.training.report import read_log

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BATCH = 20, 2


def semseg_losses(model: PSPNet, root: Path) -> list[float]:
    """SGD 0.01, momentum 0.9 and weight decay 1e-4 on all; ten times that for what is not layer0 .. layer4; poly 0.9.

    Written down from the facts, with torch's own functions: the logits are upsampled with aligned corners to the size
    of the image, cross entropy is averaged over the pixels that are not 255, and 0.4 times that of layer3's classifier
    is added. The rate is that of the iteration before: the first has the base rate, and 0 would follow the last.
    """
    base = 0.01
    groups = [{"params": getattr(model, f"layer{number}").parameters(), "lr": base} for number in range(5)]
    groups += [{"params": part.parameters(), "lr": 10 * base} for part in (model.ppm, model.cls, model.aux)]
    optimizer = torch.optim.SGD(groups, lr=base, momentum=0.9, weight_decay=1e-4)
    data = ListDataset(root, root / "train.txt", len(NAMES), TrainTransform((33, 41), scale=(0.8, 1.2)))
    losses = []
    model.train()
    for iteration, (images, labels) in enumerate(train_loader(data, BATCH, 0, 0, range(STEPS)), 1):
        x = images.double()
        for number in range(4):
            x = getattr(model, f"layer{number}")(x)
        aux, x = x, model.layer4(x)
        maps = [x]
        for size, level in zip((1, 2, 3, 6), model.ppm.features, strict=True):
            _, conv, norm, relu = level
            pooled = relu(norm(conv(F.adaptive_avg_pool2d(x, size))))
            maps.append(F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=True))
        loss = mean_loss(model.cls(torch.cat(maps, 1)), labels) + 0.4 * mean_loss(model.aux(aux), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = base * (1 - iteration / STEPS) ** 0.9 * (1 if index < 5 else 10)
    return losses


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    return nn.CrossEntropyLoss(ignore_index=255)(full, labels)


def test_losses_of_semseg(tmp_path: Path) -> None:
    root = write_toy_data(tmp_path / "data")
    torch.manual_seed(0)
    model = PSPNet(len(NAMES), ToyBackbone(), dropout=0).double()
    expected = semseg_losses(copy.deepcopy(model), root)
    defaults = TrainConfig()
    config = replace(defaults, iterations=STEPS, batch_size=BATCH, val_every=STEPS, workers=0, device="cpu")
    assert (defaults.lr, defaults.head_lr_factor) == (0.01, 10)
    train(root, tmp_path / "run", config, model=model)
    losses = [record["loss"] for record in read_log(tmp_path / "run" / "log.jsonl") if record["event"] == "iteration"]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # it learns something
    assert CONFIG.seed == config.seed == 0
