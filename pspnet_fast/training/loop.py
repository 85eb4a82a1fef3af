"""Training and evaluation loops."""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from pspnet_fast import ops
from pspnet_fast.inference.predict import predict_labels
from pspnet_fast.training.checkpoint import load_checkpoint, save_checkpoint
from pspnet_fast.training.config import TrainConfig
from pspnet_fast.training.loading import Item, train_loader, val_loader
from pspnet_fast.training.metrics import Metrics
from pspnet_fast.training.optimizer import make_loss, make_optimizer, pspnet_loss, set_poly_lr
from pspnet_fast.training.report import Report

CHECKPOINT = "checkpoint.pt"
# A resumed run may differ from its beginning in these alone; every other setting changes the result.
FREE_ON_RESUME = {"device", "workers", "log_every", "val_batch_size"}


@dataclass(frozen=True)
class TrainResult:
    """What :func:`fit` returns: a record per epoch, the best mIoU among them, the file of the last checkpoint."""

    history: list[dict[str, Any]]
    best_miou: float
    checkpoint: Path


def choose_device(name: str) -> torch.device:
    """Device of a configuration: "auto" is CUDA where there is a GPU, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def fit(
    model: nn.Module,
    train_set: Dataset[Item],
    val_set: Dataset[Item],
    config: TrainConfig,
    out_dir: Path,
    *,
    class_names: Sequence[str],
    resume: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place, validating and saving after every epoch.

    SGD with momentum, poly learning rate per iteration, cross entropy that ignores 255, 0.4 times (``aux_weight``) the
    same on the auxiliary head. Into ``out_dir`` go ``checkpoint.pt``, ``log.jsonl``, ``curves.png`` and
    ``tensorboard/``, in place of those of an earlier run unless it is resumed. A resumed run ends with the same weights
    as an uninterrupted one (bit for bit on the CPU): the checkpoint holds the model, the optimizer, the position in the
    schedule and torch's random state; data are a function of (seed, epoch, index).

    Args:
        model: returns {"out": (N, K, h, w)} and in training perhaps "aux"; tells ``align_corners``. Its children
            ``ppm``, ``cls`` and ``aux`` are the head, which learns at ``head_lr_factor`` times the rate.
        train_set, val_set: items are (image float32 (3, H, W), label int64 (H, W)). Before each epoch the training
            set's ``set_epoch(epoch)`` is called if it has one.
        class_names: K names.
        resume: go on from ``out_dir/checkpoint.pt``.
        metadata: plain data kept in the checkpoint under "metadata", for whoever loads it.

    Raises:
        ValueError: fewer training images than one batch, or a resumed run whose configuration, schedule length or
            classes or metadata are not those of its checkpoint.
        FileNotFoundError: nothing to resume.
        FloatingPointError: the loss is no longer finite.
    """
    device = choose_device(config.device)
    pin_memory = device.type == "cuda"
    images, val_images = len(train_set), len(val_set)  # type: ignore[arg-type]
    if images < config.batch_size or not val_images:
        raise ValueError(
            f"train_set must hold at least one batch (batch_size = {config.batch_size}) and val_set one image, "
            f"got {images} and {val_images}"
        )
    iterations = images // config.batch_size
    steps = config.epochs * iterations
    model.to(device=device, memory_format=_memory_format(config))  # type: ignore[call-overload]
    optimizer = make_optimizer(model, config)
    torch.manual_seed(config.seed)

    path = out_dir / CHECKPOINT
    history: list[dict[str, Any]] = []
    if resume:
        checkpoint = load_checkpoint(path)
        saved = _identity(*(checkpoint[key] for key in ("config", "steps", "class_names", "metadata")))
        _check_same_run(saved, _identity(dataclasses.asdict(config), steps, class_names, metadata or {}), path)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        _set_rng_state(checkpoint["rng"], device)
        history = checkpoint["history"]
    header = {"config": dataclasses.asdict(config), "class_names": list(class_names), "steps": steps}
    first_epoch = len(history)
    out_dir.mkdir(parents=True, exist_ok=True)
    with Report(out_dir, header, step=first_epoch * iterations, images=steps * config.batch_size) as report:
        for epoch in range(first_epoch, config.epochs):
            if hasattr(train_set, "set_epoch"):
                train_set.set_epoch(epoch)
            start = time.perf_counter()
            loader = train_loader(train_set, config.batch_size, config.workers, config.seed, epoch, pin_memory)
            loss = _train_epoch(model, loader, optimizer, config, epoch * iterations, steps, report)
            seconds = time.perf_counter() - start
            metrics = evaluate(
                model,
                val_loader(val_set, config.val_batch_size, config.workers, pin_memory),
                len(class_names),
                device,
                bf16=config.bf16,
                channels_last=config.channels_last,
            )
            history.append(
                {
                    "epoch": epoch + 1,
                    "step": (epoch + 1) * iterations,
                    "loss": loss,
                    "miou": metrics.miou,
                    "macc": metrics.macc,
                    "allacc": metrics.allacc,
                    "iou": metrics.iou.tolist(),
                    "seconds": round(time.perf_counter() - start, 3),
                    "images_per_second": round(iterations * config.batch_size / seconds, 3),
                }
            )
            report.epoch(history[-1])
            save_checkpoint(
                path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": _get_rng_state(device),
                    "step": (epoch + 1) * iterations,
                    "steps": steps,
                    "config": dataclasses.asdict(config),
                    "class_names": list(class_names),
                    "metadata": dict(metadata or {}),
                    "history": history,
                    "best_miou": _best_miou(history),
                },
            )
            report.draw_curves()
    return TrainResult(history, _best_miou(history), path)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Item],
    num_classes: int,
    device: torch.device | str = "cpu",
    *,
    bf16: bool = False,
    channels_last: bool = False,
) -> Metrics:
    """Score ``model`` on every batch of ``loader``; predictions are made at the size of the images.

    Args:
        model: on ``device``; put into evaluation mode for the time of the call.
        loader: batches of (images (N, 3, H, W) float32, labels (N, H, W) int64, 255 ignored).
        num_classes: K.
        bf16: run the model under bfloat16 autocast.
        channels_last: bring the images to that layout.
    """
    device = torch.device(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    for images, labels in tqdm(loader, desc="validation", unit="batch", leave=False, disable=None):
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            predictions = predict_labels(model, images)
        ops.confusion_matrix(predictions, labels.to(device, non_blocking=True), num_classes, out=confusion)
    model.train(was_training)
    return Metrics(confusion.cpu())


def _train_epoch(
    model: nn.Module,
    loader: Iterable[Item],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    first_step: int,
    steps: int,
    report: Report,
) -> float:
    """Train on every batch; return the mean loss. ``first_step`` is the iteration of the first batch, from 0."""
    device = next(model.parameters()).device
    criterion = make_loss(config, bool(model.align_corners)).to(device)
    epoch_losses: list[float] = []
    pending: list[tuple[float, Tensor]] = []  # learning rate and loss of the iterations not yet looked at

    def look() -> None:
        losses = torch.stack([loss for _, loss in pending]).tolist()  # the only wait for the device
        begin = first_step + len(epoch_losses) + 1
        report.iterations(begin, [lr for lr, _ in pending], losses)
        for step, loss in enumerate(losses, begin):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at iteration {step} of {steps}; try a smaller train.lr "
                    "(on a GPU a label that is no class does the same)"
                )
        epoch_losses.extend(losses)
        pending.clear()

    model.train()
    for images, labels in loader:
        step = first_step + len(epoch_losses) + len(pending)
        lr = set_poly_lr(optimizer, step, steps, config.power)
        images = images.to(device, non_blocking=True, memory_format=_memory_format(config))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            outputs = model(images)
        loss = pspnet_loss(criterion, outputs, labels.to(device, non_blocking=True), config.aux_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        pending.append((lr, loss.detach()))
        report.advance(len(images))
        if len(pending) == config.log_every:
            look()
    if pending:
        look()
    return sum(epoch_losses) / len(epoch_losses)


def _memory_format(config: TrainConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def _best_miou(history: Sequence[Mapping[str, Any]]) -> float:
    return max(record["miou"] for record in history)


def _get_rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _identity(
    config: Mapping[str, Any], steps: int, class_names: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings that a run must keep from its beginning to its end."""
    settings = {f"train.{name}": value for name, value in config.items() if name not in FREE_ON_RESUME}
    return {**settings, "number of iterations": steps, "class_names": list(class_names), **metadata}


def _check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on under settings that would make another run of it."""
    for name in {**saved, **now}:
        if saved.get(name) != now.get(name):
            raise ValueError(f"cannot resume {path}: its {name} is {saved.get(name)}, now {now.get(name)}")
