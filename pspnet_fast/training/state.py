"""The state of a training run: what a checkpoint holds."""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from pspnet_fast.training.checkpoint import load_checkpoint, save_checkpoint
from pspnet_fast.training.config_train import TrainConfig
from pspnet_fast.training.run_folder import (
    BEST,
    CHECKPOINT,
    ResumeError,
    check_same_run,
    keep_checkpoint,
    previous_checkpoints,
    settings_of_run,
    with_defaults,
)
from pspnet_fast.training.step import Step


class State:
    """Model, optimiser and averages at a place in the training, saved and restored whole.

    Random numbers are no part of it: those of an iteration depend on the seed and its number.

    Attributes:
        step: iterations done, of ``steps``; ``iterations`` make an epoch.
        history: a record per validation.
        losses: of the iterations since the last validation.
        finite: the model's weights when they were last found finite, and their iteration.
    """

    def __init__(
        self,
        trained: Step,
        config: TrainConfig,
        iterations: int,
        out_dir: Path,
        class_names: list[str],
        metadata: dict[str, Any],
    ) -> None:
        self.trained, self.config, self.out_dir = trained, config, out_dir
        self.class_names, self.metadata = class_names, metadata
        self.iterations = iterations
        self.steps = config.iterations or config.epochs * iterations
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.path = out_dir / CHECKPOINT
        self.finite: tuple[int, dict[str, torch.Tensor]] | None = None
        self._saved: int | None = None  # iteration of the file at path

    @property
    def best_miou(self) -> float | None:
        """The greatest mIoU of a validation; None if no one has any."""
        return max((score for score in self._scores() if score is not None), default=None)

    @property
    def stale(self) -> int:
        """Validations since the best one, or in all if none has a score."""
        scores = self._scores()
        return len(scores) - 1 - scores.index(self.best_miou) if self.best_miou is not None else len(scores)

    def _scores(self) -> list[float | None]:
        # Older checkpoints hold NaN where there is no score.
        scores = (record["miou"] for record in self.history)
        return [None if score is None or math.isnan(score) else score for score in scores]

    def load(self, allow: Collection[str], previous: bool) -> None:
        """Go on from the checkpoint in the run's folder; with ``previous`` from the newest there that is whole."""
        path = self.path
        try:
            checkpoint = load_checkpoint(path)
        except (ValueError, FileNotFoundError) as error:
            older = previous_checkpoints(self.out_dir)
            if not older:
                raise
            if not previous:
                raise type(error)(
                    f"{error}. {older[0].name} is the one before it; go on from there with --previous"
                ) from None
            path, checkpoint = _newest_whole(older, error)
        self._saved = checkpoint["step"] if path == self.path else None
        self._check(checkpoint, path, allow)
        self._restore(checkpoint, path)

    def _check(self, checkpoint: dict[str, Any], path: Path, allow: Collection[str]) -> None:
        if "optimizer" not in checkpoint:
            raise ResumeError(f"cannot resume {path}: it holds weights alone, as {BEST} does, no optimizer's state")
        config, step = checkpoint["config"], checkpoint["step"]
        iterations = checkpoint.get("iterations", checkpoint["steps"] // config["epochs"])
        saved = settings_of_run(config, iterations, checkpoint["class_names"], checkpoint["metadata"])
        now = settings_of_run(dataclasses.asdict(self.config), self.iterations, self.class_names, self.metadata)
        check_same_run(with_defaults(saved, now), now, path, allow)
        if step > self.steps:
            limit = "iterations" if self.config.iterations else "epochs"
            raise ResumeError(
                f"cannot resume {path}: {step} iterations are done, more than the {self.steps} "
                f"of train.{limit} = {getattr(self.config, limit)}"
            )

    def _restore(self, checkpoint: dict[str, Any], path: Path) -> None:
        trained = self.trained
        self.step, self.history = checkpoint["step"], checkpoint["history"]
        self.losses = list(checkpoint.get("losses", []))
        # The optimizer's state comes with the settings of its groups; those that were allowed to change are new.
        groups = trained.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        try:
            trained.model.load_state_dict(checkpoint["model"])
            trained.optimizer.load_state_dict(checkpoint["optimizer"])
            if trained.average is not None:
                trained.average.module.load_state_dict(checkpoint.get("average", checkpoint["model"]))
                trained.average.n_averaged.fill_(self.step)
        except (RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise ResumeError(f"cannot resume {path}: its weights are of another model ({first})") from None
        for group, new in zip(trained.optimizer.param_groups, settings, strict=True):
            group.update(new)
        if "scaler" in checkpoint and self.config.fp16:
            trained.scaler.load_state_dict(checkpoint["scaler"])

    def save(self) -> None:
        """Write the state as it is between two iterations."""
        if self._saved is not None and self._saved != self.step:
            keep_checkpoint(self.path, self._saved, self.config.keep - 1)
        trained = self.trained
        state = {
            **self._described(),
            "model": trained.model.state_dict(),
            "optimizer": trained.optimizer.state_dict(),
            "losses": self.losses,
        }
        if trained.average is not None:
            state["average"] = trained.average.module.state_dict()
        if self.config.fp16:
            state["scaler"] = trained.scaler.state_dict()
        save_checkpoint(self.path, state)
        self._saved = self.step

    def save_best(self) -> None:
        """Write the weights that were validated."""
        save_checkpoint(self.out_dir / BEST, {**self._described(), "model": self.trained.validated.state_dict()})

    def keep_finite(self) -> bool:
        """Remember the weights if all of them are finite; whether they are."""
        weights = self.trained.model.state_dict()
        numbers = [value for value in weights.values() if value.is_floating_point()]
        if not torch.stack([value.isfinite().all() for value in numbers]).all():
            return False
        if self.finite is None:
            self.finite = self.step, {name: value.clone() for name, value in weights.items()}
            return True
        kept = self.finite[1]
        for name, value in weights.items():
            kept[name].copy_(value)
        self.finite = self.step, kept
        return True

    def save_finite(self, path: Path) -> int | None:
        """Write the weights that were last found finite, as :meth:`save_best` does; the iteration they are of."""
        if self.finite is None:
            return None
        step, weights = self.finite
        save_checkpoint(path, {**self._described(), "step": step, "model": weights})
        return step

    def _described(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "steps": self.steps,
            "iterations": self.iterations,
            "config": dataclasses.asdict(self.config),
            "class_names": self.class_names,
            "metadata": self.metadata,
            "history": self.history,
            "best_miou": self.best_miou,
        }


def _newest_whole(paths: list[Path], error: Exception) -> tuple[Path, dict[str, Any]]:
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except ValueError:
            continue
    raise ValueError(f"{error}; nor is any of the {len(paths)} checkpoints before it whole") from None
