"""Training of a model: :func:`fit`."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.models import PSPNet
from pspnet_fast.ops.kept_memory import nothing_kept
from pspnet_fast.training.callbacks import Callback
from pspnet_fast.training.config_rules import ConfigError
from pspnet_fast.training.config_train import TrainConfig
from pspnet_fast.training.distributed import World, join, synchronised_norms
from pspnet_fast.training.evaluation import choose_device
from pspnet_fast.training.loading import Item
from pspnet_fast.training.protocol import describe
from pspnet_fast.training.run import Run
from pspnet_fast.training.run_folder import BEST, CHECKPOINT, FINITE, locked, previous_checkpoints
from pspnet_fast.training.state import State
from pspnet_fast.training.step import Step


@dataclass(frozen=True)
class TrainResult:
    """What :func:`fit` returns.

    Attributes:
        history: a record per validation; a score that no labelled pixel gives is None.
        best_miou: the greatest mIoU among them; None if there is none.
        checkpoint: file of the last state.
        best: file of the validation with the best mIoU, of several the first; None if there is none.
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
    previous: bool = False,
    allow: Collection[str] = (),
    metadata: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train ``model`` in place, validating and saving as ``config`` says, by default after every epoch.

    By default SGD with momentum, poly learning rate per iteration, cross entropy that ignores 255, 0.4 times
    (``aux_weight``) the same on the auxiliary head; docs/training.md has the other protocols. Into ``out_dir`` go
    ``checkpoint.pt`` (the last state), ``best.pt`` (the best), ``log.jsonl``, ``curves.png`` and ``tensorboard/``, in
    place of those of an earlier run unless it is resumed. A resumed run ends with the same weights as an uninterrupted
    one (bit for bit on the CPU): order, transforms and dropout are functions of the seed and the iteration. SIGINT
    (Ctrl+C), SIGTERM and SIGHUP end the iteration under way and save its state first.

    Under torchrun each process calls this with the same arguments: batches are shared among the processes, of which
    the first writes the files, and batch norms become synchronised ones.

    Args:
        model: returns {"out": (N, K, h, w)} and in training perhaps "aux"; tells ``align_corners``. Its children
            ``config.head`` are the head, which learns at ``head_lr_factor`` times the rate. It trains in the dtype of
            its parameters.
        train_set, val_set: items are (image float32 (3, H, W), label int64 (H, W)). Before an item is read the training
            set's ``set_epoch(epoch)`` is called if it has one.
        class_names: K different names, 255 at most, since label 255 is ignored.
        resume: go on from ``out_dir/checkpoint.pt``.
        previous: if that one is damaged, go on from the newest before it that is whole.
        allow: keys of settings that a resumed run may change, such as "train.epochs" or "train.lr".
        metadata: plain data kept in the checkpoint under "metadata"; docs/checkpoints.md says what prediction reads
            there. "model" is filled in for a :class:`PSPNet` that can say its own arguments, "mean" and "std" where
            ``val_set.transform`` has them.
        callbacks: are told of iterations and validations, in the first process.

    Raises:
        ValueError: fewer training images than one batch, more than 255 classes, a name twice, another number of class
            weights, a batch that cannot be shared among the processes, or another process training into ``out_dir``.
        ResumeError: a resumed run whose settings are not those of its checkpoint (a ValueError).
        FileNotFoundError: nothing to resume.
        OSError: a file of the run cannot be written; the checkpoint before is whole.
        FloatingPointError: the loss or the weights are no longer finite; ``finite.pt`` holds the last that were.
        Interrupted: a signal came, and the state is saved (a KeyboardInterrupt).
    """
    world = World.from_environment()
    _check(config, train_set, val_set, class_names, world)
    device = choose_device(config.device, world.local_rank)
    checkpoint, best = out_dir / CHECKPOINT, out_dir / BEST
    if resume and not (checkpoint.is_file() or (previous and previous_checkpoints(out_dir))):
        raise FileNotFoundError(f"no checkpoint {checkpoint}")
    out_dir.mkdir(parents=True, exist_ok=True)
    join(world, device)
    with (
        locked(out_dir) if world.first else nullcontext(),
        _deterministic(config),
        nothing_kept(),
        synchronised_norms(model.to(device), world if config.sync_norms else World()),
    ):
        trained = Step(model, config, device, world)
        iterations = len(train_set) // config.batch_size  # type: ignore[arg-type]
        metadata = _describe(model, val_set, metadata)
        state = State(trained, config, iterations, out_dir, list(class_names), metadata)
        if resume:
            state.load(allow, previous)
        elif world.first:
            for path in (checkpoint, best, out_dir / FINITE, *previous_checkpoints(out_dir)):
                path.unlink(missing_ok=True)
        Run(state, train_set, val_set, device, world, callbacks, describe(config, iterations, world)).train()
        result = TrainResult(state.history, state.best_miou, checkpoint, None if state.best_miou is None else best)
        for callback in callbacks if world.first else ():
            callback.on_end(result)
    return result


def _check(
    config: TrainConfig, train_set: Dataset[Item], val_set: Dataset[Item], class_names: Sequence[str], world: World
) -> None:
    images, val_images = len(train_set), len(val_set)  # type: ignore[arg-type]
    if images < config.batch_size or not val_images:
        raise ValueError(
            f"the training set must hold at least one batch (train.batch_size = {config.batch_size}) and the "
            f"validation set one image, got {images} and {val_images}"
        )
    parts = world.size * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"train.batch_size must be a multiple of {parts} = {world.size} processes * train.accumulate, "
            f"got {config.batch_size}"
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


@contextmanager
def _deterministic(config: TrainConfig) -> Iterator[None]:
    """torch's deterministic algorithms while the context is open, if the configuration asks for them."""
    if not config.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


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
