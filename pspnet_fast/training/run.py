"""A training run between its first iteration and its last."""

import dataclasses
import math
import time
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.files import check_space
from pspnet_fast.training.checkpoint import load_checkpoint, save_checkpoint
from pspnet_fast.training.config import TrainConfig
from pspnet_fast.training.evaluation import evaluate
from pspnet_fast.training.interruption import Interrupted, Interruption
from pspnet_fast.training.loading import Item, train_loader, val_loader
from pspnet_fast.training.optimizer import make_loss, make_optimizer, pspnet_loss, set_poly_lr
from pspnet_fast.training.report import Report
from pspnet_fast.training.run_folder import BEST, CHECKPOINT, ResumeError, check_same_run, settings_of_run


class Run:
    """What a checkpoint holds, and the steps that change it. See :func:`pspnet_fast.training.fit` for the arguments.

    Attributes:
        history: a record per epoch that is done.
        losses: of the iterations of the epoch under way.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: Dataset[Item],
        val_set: Dataset[Item],
        config: TrainConfig,
        out_dir: Path,
        device: torch.device,
        class_names: list[str],
        metadata: dict[str, Any],
    ) -> None:
        self.train_set, self.val_set, self.config, self.out_dir = train_set, val_set, config, out_dir
        self.class_names, self.metadata = class_names, metadata
        self.path = out_dir / CHECKPOINT
        self.device = device
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.criterion = make_loss(config, bool(model.align_corners)).to(self.device)
        self.optimizer = make_optimizer(model, config)
        self.iterations = len(train_set) // config.batch_size  # type: ignore[arg-type]
        self.steps = config.epochs * self.iterations
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.warned = {"train": False, "val": False}
        torch.manual_seed(config.seed)

    @property
    def step(self) -> int:
        """Iterations done."""
        return len(self.history) * self.iterations + len(self.losses)

    @property
    def best_miou(self) -> float | None:
        """The greatest mIoU of an epoch; None if no epoch has one."""
        # Older checkpoints hold NaN where there is no score.
        scores = [record["miou"] for record in self.history if record["miou"] is not None]
        return max((score for score in scores if not math.isnan(score)), default=None)

    def load(self, allow: Collection[str]) -> None:
        """Go on from the checkpoint in the run's folder."""
        checkpoint = load_checkpoint(self.path)
        if "optimizer" not in checkpoint:
            raise ResumeError(
                f"cannot resume {self.path}: it holds weights alone, as {BEST} does, no optimizer's state"
            )
        config = checkpoint["config"]
        saved = settings_of_run(
            config, checkpoint["steps"] // config["epochs"], checkpoint["class_names"], checkpoint["metadata"]
        )
        now = settings_of_run(dataclasses.asdict(self.config), self.iterations, self.class_names, self.metadata)
        check_same_run(saved, now, self.path, allow)
        self.history = checkpoint["history"]
        self.losses = list(checkpoint.get("losses", []))
        if self.step > self.steps:
            raise ResumeError(
                f"cannot resume {self.path}: {self.step} iterations are done, more than the {self.steps} "
                f"of train.epochs = {self.config.epochs}"
            )
        # The optimizer's state comes with the settings of its groups; those that were allowed to change are new.
        groups = self.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise ResumeError(f"cannot resume {self.path}: its weights are of another model ({first})") from None
        for group, new in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(new)
        _set_rng_state(checkpoint["rng"], self.device)

    def save(self) -> None:
        """Write the state as it is between two iterations."""
        save_checkpoint(
            self.path,
            {
                **self._weights(),
                "optimizer": self.optimizer.state_dict(),
                "rng": _get_rng_state(self.device),
                "losses": self.losses,
            },
        )

    def _weights(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "step": self.step,
            "steps": self.steps,
            "config": dataclasses.asdict(self.config),
            "class_names": self.class_names,
            "metadata": self.metadata,
            "history": self.history,
            "best_miou": self.best_miou,
        }

    def train(self) -> None:
        """Run the epochs that are left.

        Raises:
            OSError: a file of the run cannot be written, or the disk has no room for its checkpoints from the start.
        """
        # checkpoint.pt holds weights and momentum, best.pt weights; a file before stays until the new one is whole
        weights = sum(value.nbytes for value in self.model.state_dict().values())
        existing = sum(path.stat().st_size for path in (self.path, self.out_dir / BEST) if path.exists())
        check_space(self.out_dir, 5 * weights - existing, "the checkpoints of the run")
        header = {"config": dataclasses.asdict(self.config), "class_names": self.class_names, "steps": self.steps}
        images = self.steps * self.config.batch_size
        with (
            Report(self.out_dir, header, step=self.step, epochs=len(self.history), images=images) as report,
            Interruption() as interruption,
        ):
            try:
                while len(self.history) < self.config.epochs:
                    self._epoch(report, interruption)
            except Interrupted:
                self.save()
                raise

    def _epoch(self, report: Report, interruption: Interruption) -> None:
        epoch, config = len(self.history), self.config
        pin_memory = self.device.type == "cuda"
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(epoch)
        start, done = time.perf_counter(), len(self.losses)
        if done < self.iterations:
            loader = train_loader(
                self.train_set, config.batch_size, config.workers, config.seed, epoch, pin_memory, done=done
            )
            self._train_epoch(interruption.between(loader), report)
        seconds = time.perf_counter() - start
        metrics = evaluate(
            self.model,
            interruption.between(val_loader(self.val_set, config.val_batch_size, config.workers, pin_memory)),
            len(self.class_names),
            self.device,
            bf16=config.bf16,
            channels_last=config.channels_last,
        )
        if not metrics.confusion.any():
            self._warn_of_no_label("val", self.val_set, "there are no scores, and no best epoch is kept")
        best, record = self.best_miou, metrics.record()
        self.history.append(
            {
                "epoch": epoch + 1,
                "step": self.step,
                "loss": sum(self.losses) / len(self.losses),
                **record,
                "seconds": round(time.perf_counter() - start, 3),
                "images_per_second": round((self.iterations - done) * config.batch_size / seconds, 3),
            }
        )
        self.losses = []
        report.epoch(self.history[-1])
        # The best first: an interruption between the two files repeats the epoch, which then writes both again.
        if record["miou"] is not None and (best is None or record["miou"] > best):
            save_checkpoint(self.out_dir / BEST, self._weights())
        self.save()
        report.draw_curves()

    def _train_epoch(self, batches: Iterable[Item], report: Report) -> None:
        """Train on every batch, adding to ``losses``; they are complete whenever ``batches`` ends or raises."""
        pending: list[tuple[float, Tensor]] = []  # of iterations not yet looked at: rate, and (loss, has a label)

        def look() -> None:
            if not pending:
                return
            looked = torch.stack([values for _, values in pending]).tolist()  # the only wait for the device
            losses = [loss for loss, _ in looked]
            begin = self.step + 1
            report.iterations(begin, [lr for lr, _ in pending], losses)
            for step, loss in enumerate(losses, begin):
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is {loss} at iteration {step} of {self.steps}; try a smaller train.lr "
                        "(on a GPU a label that is no class does the same)"
                    )
            if begin == 1 and not any(labelled for _, labelled in looked):
                what = f"the first {len(looked)} batches teach nothing (loss 0)"
                self._warn_of_no_label("train", self.train_set, what)
            self.losses.extend(losses)
            pending.clear()

        self.model.train()
        try:
            for images, labels in batches:
                lr = set_poly_lr(self.optimizer, self.step + len(pending), self.steps, self.config.power)
                images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
                labels = labels.to(self.device, non_blocking=True)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
                    outputs = self.model(images)
                loss = pspnet_loss(self.criterion, outputs, labels, self.config.aux_weight)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                pending.append((lr, torch.stack((loss.detach().float(), (labels != IGNORE_INDEX).any().float()))))
                report.advance(len(images))
                if len(pending) == self.config.log_every:
                    look()
        except Interrupted:
            look()
            raise
        look()

    def _warn_of_no_label(self, split: str, dataset: Dataset[Item], consequence: str) -> None:
        """Say once that no pixel of a split is labelled, naming its list where it is known."""
        if not self.warned[split]:
            self.warned[split] = True
            name = getattr(dataset, "source", f"{split}_set")
            warnings.warn(
                f"{name}: no pixel has a label, all are {IGNORE_INDEX} (ignored): {consequence}", stacklevel=5
            )


def _get_rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
