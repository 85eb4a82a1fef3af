"""Training of a model: :func:`fit`."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.models import PSPNet
from pspnet_fast.training.config import ConfigError, TrainConfig
from pspnet_fast.training.evaluation import choose_device
from pspnet_fast.training.loading import Item
from pspnet_fast.training.run import Run
from pspnet_fast.training.run_folder import BEST, CHECKPOINT, locked, refuse_distributed


@dataclass(frozen=True)
class TrainResult:
    """What :func:`fit` returns.

    Attributes:
        history: a record per epoch; a score that no labelled pixel gives is None.
        best_miou: the greatest mIoU among them; None if there is none.
        checkpoint: file of the last epoch.
        best: file of the epoch with the best mIoU, of several the first; None if there is none.
    """

    history: list[dict[str, Any]]
    best_miou: float | None
    checkpoint: Path
    best: Path | None = None


def fit(
    model: nn.Module,
    train_set: Dataset[Item],
    val_set: Dataset[Item],
    config: TrainConfig,
    out_dir: Path,
    *,
    class_names: Sequence[str],
    resume: bool = False,
    allow: Collection[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place, validating and saving after every epoch.

    SGD with momentum, poly learning rate per iteration, cross entropy that ignores 255, 0.4 times (``aux_weight``) the
    same on the auxiliary head. Into ``out_dir`` go ``checkpoint.pt`` (the last epoch), ``best.pt`` (the best),
    ``log.jsonl``, ``curves.png`` and ``tensorboard/``, in place of those of an earlier run unless it is resumed. A
    resumed run ends with the same weights as an uninterrupted one (bit for bit on the CPU): the checkpoint holds the
    model, the optimizer, the position in the schedule and torch's random state; data are a function of (seed, epoch,
    index). SIGINT (Ctrl+C), SIGTERM and SIGHUP end the iteration under way and save its state first.

    Args:
        model: returns {"out": (N, K, h, w)} and in training perhaps "aux"; tells ``align_corners``. Its children
            ``ppm``, ``cls`` and ``aux`` are the head, which learns at ``head_lr_factor`` times the rate.
        train_set, val_set: items are (image float32 (3, H, W), label int64 (H, W)). Before each epoch the training
            set's ``set_epoch(epoch)`` is called if it has one.
        class_names: K different names, 255 at most, since label 255 is ignored.
        resume: go on from ``out_dir/checkpoint.pt``.
        allow: keys of settings that a resumed run may change, such as "train.epochs" or "train.lr".
        metadata: plain data kept in the checkpoint under "metadata"; docs/checkpoints.md says what prediction reads
            there. "model" is filled in for a :class:`PSPNet` that can say its own arguments, "mean" and "std" where
            ``val_set.transform`` has them.

    Raises:
        ValueError: fewer training images than one batch, more than 255 classes, a name twice, another number of class
            weights, a launcher's several processes, or another process training into ``out_dir``.
        ResumeError: a resumed run whose settings are not those of its checkpoint (a ValueError).
        FileNotFoundError: nothing to resume.
        OSError: a file of the run cannot be written; the checkpoint before is whole.
        FloatingPointError: the loss is no longer finite.
        Interrupted: a signal came, and the state is saved (a KeyboardInterrupt).
    """
    refuse_distributed(os.environ)
    images, val_images = len(train_set), len(val_set)  # type: ignore[arg-type]
    if images < config.batch_size or not val_images:
        raise ValueError(
            f"the training set must hold at least one batch (train.batch_size = {config.batch_size}) and the "
            f"validation set one image, got {images} and {val_images}"
        )
    if not 1 <= len(class_names) <= IGNORE_INDEX:
        raise ValueError(f"class_names must be 1 to {IGNORE_INDEX} names, got {len(class_names)}")
    if twice := next((name for name in class_names if list(class_names).count(name) > 1), None):
        raise ValueError(f"class_names must differ, but {twice!r} is given more than once")
    weights = config.class_weights
    if weights is not None and len(weights) != len(class_names):
        raise ConfigError(
            f"train.class_weights must be one number a class, {len(class_names)} in all, got {len(weights)}"
        )
    device = choose_device(config.device)
    checkpoint, best = out_dir / CHECKPOINT, out_dir / BEST
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint {checkpoint}")
    out_dir.mkdir(parents=True, exist_ok=True)
    with locked(out_dir):
        metadata = _describe(model, val_set, metadata)
        run = Run(model, train_set, val_set, config, out_dir, device, list(class_names), metadata)
        if resume:
            run.load(allow)
        else:
            checkpoint.unlink(missing_ok=True)
            best.unlink(missing_ok=True)
        run.train()
    return TrainResult(run.history, run.best_miou, checkpoint, None if run.best_miou is None else best)


def _describe(model: nn.Module, val_set: Dataset[Item], metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The metadata, with what model and data say of themselves."""
    known: dict[str, Any] = {}
    if isinstance(model, PSPNet) and model.config is not None:
        known["model"] = model.config
    transform = getattr(val_set, "transform", None)
    for name in ("mean", "std"):
        if hasattr(transform, name):
            known[name] = [float(value) for value in getattr(transform, name)]
    return {**known, **(metadata or {})}
