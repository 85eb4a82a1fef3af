"""A training run between its first iteration and its last."""

import contextlib
import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pspnet_fast import info
from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.files import check_space
from pspnet_fast.inference.render import Picture
from pspnet_fast.training.callbacks import Callback
from pspnet_fast.training.distributed import World
from pspnet_fast.training.evaluation import evaluate
from pspnet_fast.training.interruption import Interrupted, Interruption
from pspnet_fast.training.loading import Item, places_of, train_loader, val_loader
from pspnet_fast.training.metrics import Metrics
from pspnet_fast.training.optimizer import set_lr
from pspnet_fast.training.pictures import validation_pictures
from pspnet_fast.training.report import Report
from pspnet_fast.training.run_folder import BEST, FINITE
from pspnet_fast.training.state import State
from pspnet_fast.training.times import PARTS, Times

SLOW_LOADING = 0.3  # share of the time that training may wait for images before a warning says so
LONG = 30.0  # seconds of training after which loading is judged
NAMED = 16  # images of a batch that a message names


class Run:
    """The loop over iterations, validations and checkpoints. See :func:`pspnet_fast.training.fit` for the arguments."""

    def __init__(
        self,
        state: State,
        train_set: Dataset[Item],
        val_set: Dataset[Item],
        device: torch.device,
        world: World,
        callbacks: Sequence[Callback],
        protocol: list[str],
    ) -> None:
        self.state, self.trained, self.config = state, state.trained, state.config
        self.train_set, self.val_set, self.device, self.world = train_set, val_set, device, world
        self.callbacks = callbacks if world.first else []
        self.protocol = protocol
        self.report: Report | None = None
        self.interruption = Interruption()
        self.times = Times(device)
        self.seconds = dict.fromkeys(PARTS, 0.0)  # since the last validation
        self.trained_images = 0
        self.watched = dict.fromkeys(PARTS, 0.0)  # seconds, without those of the first look
        self.told: set[str] = set()  # warnings that are given once

    def train(self) -> None:
        """Run the iterations that are left.

        Raises:
            OSError: a file of the run cannot be written, or the disk has no room for its checkpoints from the start.
        """
        state = self.state
        with self.interruption, self._reporting():
            state.keep_finite()
            batches = self._batches()
            try:
                while True:
                    if self._validation_is_due():
                        self._validate()
                    patience = self.config.patience
                    if state.step == state.steps or (patience is not None and state.stale >= patience):
                        return
                    self._train_until(self._next_stop(), batches)
                    if not self._validation_is_due():
                        self._save()
            except Interrupted:
                self._save()
                raise

    def _reporting(self) -> contextlib.AbstractContextManager[Any]:
        state = self.state
        if not self.world.first:
            return contextlib.nullcontext()
        # a checkpoint holds weights and what the optimiser and the averages keep, best.pt weights; each file is there
        # twice while a new one is written
        weights = sum(value.nbytes for value in self.trained.model.state_dict().values())
        copies = (2 + (self.config.optimizer == "adamw") + (self.config.ema is not None)) * self.config.keep + 1
        paths = [state.path, state.out_dir / BEST]
        existing = sum(path.stat().st_size for path in paths if path.exists())
        check_space(state.out_dir, (copies + 2) * weights - existing, "the checkpoints of the run")
        facts = info.collect()
        header: dict[str, Any] = {
            "config": dataclasses.asdict(self.config),
            "class_names": state.class_names,
            "steps": state.steps,
            "protocol": self.protocol,
            "versions": facts["versions"],
            "machine": facts["machine"],
        }
        header |= {key: state.metadata[key] for key in ("model", "data") if isinstance(state.metadata.get(key), dict)}
        validated = state.history[-1]["step"] if state.history else 0
        epochs, images = state.steps / state.iterations, state.steps * self.config.batch_size
        self.report = Report(state.out_dir, header, state.step, validated, epochs, images)
        return self.report

    def _batches(self) -> Iterator[Item]:
        """This process's parts of the batches that are left."""
        state, config = self.state, self.config
        if state.step == state.steps:
            return iter(())
        loader = train_loader(
            self.train_set,
            config.batch_size,
            config.workers,
            config.seed,
            range(state.step, state.steps),
            self.device.type == "cuda",
            share=self.world.share,
            parts=config.accumulate,
        )
        return iter(self._interruptible(loader))

    def _interruptible(self, batches: Any) -> Any:
        """Alone a process stops before any batch; several agree on an iteration when they look at the losses."""
        return self.interruption.between(batches) if self.world.size == 1 else batches

    def _validation_is_due(self) -> bool:
        state = self.state
        if state.history and state.history[-1]["step"] == state.step:
            return False
        return state.step == state.steps or (state.step > 0 and state.step % self._validation_interval() == 0)

    def _validation_interval(self) -> int:
        return self.config.val_every or self.config.val_epochs * self.state.iterations

    def _next_stop(self) -> int:
        """The iteration after which something has to be saved or validated."""
        intervals = (self._validation_interval(), self.state.iterations, self.config.checkpoint_every)
        stops = [(self.state.step // interval + 1) * interval for interval in intervals if interval]
        return min(*stops, self.state.steps)

    def _save(self) -> None:
        if self.world.first:
            self.state.save()

    def _train_until(self, stop: int, batches: Iterator[Item]) -> None:
        """Train up to iteration ``stop``; the state is complete whenever this ends or raises Interrupted."""
        state, pending = self.state, _Pending()
        self.trained.train()
        self.times.start()
        try:
            for step in range(state.step, stop):
                parts = list(itertools.islice(batches, self.config.accumulate))
                self.times.mark("data")
                lr = set_lr(self.trained.optimizer, step, state.steps, self.config)
                _seed((self.config.seed, step, self.world.rank))
                pending.values.append(self.trained(parts, self.times))
                pending.lrs.append(lr)
                if self.report:
                    self.report.advance(self.config.batch_size)
                if len(pending.lrs) == self.config.log_every:
                    self._look(pending)
                    self._agree_to_stop()
        except Interrupted:
            self._look(pending)
            raise
        self._look(pending)
        self._agree_to_stop()

    def _look(self, pending: "_Pending") -> None:
        """Take the losses from the device, the only wait for it, and tell them; stop where they are not finite."""
        if not pending.lrs:
            return
        state = self.state
        looked = self.world.sum(torch.stack(pending.values)).tolist()
        losses, first = [loss for loss, _ in looked], state.step + 1
        state.step += len(losses)
        if self.report:
            self.report.iterations(first, pending.lrs, losses)
        for step, (lr, loss) in enumerate(zip(pending.lrs, losses, strict=True), first):
            if not math.isfinite(loss):
                self._stop_diverged(step, loss)
            for callback in self.callbacks:
                callback.on_step(step, {"loss": loss, "lr": lr})
        if not state.keep_finite():
            self._stop_diverged(state.step, None)
        if first == 1 and not any(labelled for _, labelled in looked):
            what = f"the first {len(looked)} batches teach nothing (loss 0)"
            self._warn_of_no_label("train", self.train_set, what)
        state.losses.extend(losses)
        self.trained_images += len(losses) * self.config.batch_size
        self._add_times()
        pending.clear()

    def _agree_to_stop(self) -> None:
        """Several processes stop after the same iteration, whichever of them the signal went to."""
        if self.world.size > 1 and (number := self.world.greatest(self.interruption.number, self.device)):
            raise Interrupted(number)

    def _add_times(self) -> None:
        seconds = self.times.read()
        if any(self.seconds.values()):  # the first images wait for the loading processes to start
            self.watched = {part: self.watched[part] + value for part, value in seconds.items()}
        total = sum(self.watched.values())
        share = self.watched["data"] / total if total > LONG else 0.0
        if share > SLOW_LOADING and "loading" not in self.told and self.world.first:
            self.told.add("loading")
            warnings.warn(
                f"loading is the bottleneck: training waits for images {share:.0%} of the time; more train.workers "
                f"(now {self.config.workers}), a faster disk or smaller files would help (docs/training.md)",
                stacklevel=2,
            )
        self.seconds = {part: self.seconds[part] + value for part, value in seconds.items()}

    def _stop_diverged(self, step: int, loss: float | None) -> None:
        """Save the last finite weights and raise, naming the images of the iteration."""
        state, config = self.state, self.config
        images = len(self.train_set)  # type: ignore[arg-type]
        pairs = getattr(self.train_set, "pairs", None)
        indices = [index for _, index in places_of(images, config.batch_size, config.seed, step - 1)]
        names = [str(pairs[index][0]) if pairs else f"number {index}" for index in indices]
        named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        path = state.out_dir / FINITE
        kept = state.save_finite(path) if self.world.first else None
        saved = f"{path} holds the weights of iteration {kept}" if kept is not None else "no finite weights are saved"
        what = "weights are no longer finite after" if loss is None else f"loss is {loss} at"
        raise FloatingPointError(
            f"the {what} iteration {step} of {state.steps}, of the images {named}; {saved}. Try a smaller train.lr, "
            "train.warmup or train.clip_norm (on a GPU a label that is no class does the same)"
        )

    def _validate(self) -> None:
        """Score the weights, record it, and save the state, and the weights if they are the best."""
        state, config = self.state, self.config
        start = time.perf_counter()
        loader = val_loader(
            self.val_set, config.val_batch_size, config.workers, self.device.type == "cuda", share=self.world.share
        )
        metrics = evaluate(
            self.trained.validated,
            self._interruptible(loader),
            len(state.class_names),
            self.device,
            bf16=config.bf16,
            fp16=config.fp16,
            channels_last=config.channels_last,
            progress=self.world.first,
        )
        metrics = Metrics(self.world.sum(metrics.confusion.to(self.device)).cpu())
        if not metrics.confusion.any():
            self._warn_of_no_label("val", self.val_set, "there are no scores, and no best epoch is kept")
        best, scores = state.best_miou, metrics.record()
        seconds, trained = sum(self.seconds.values()), self.trained_images
        epoch = state.step / state.iterations
        record = {
            "epoch": int(epoch) if epoch.is_integer() else round(epoch, 3),
            "step": state.step,
            "loss": sum(state.losses) / len(state.losses),
            **scores,
            "seconds": round(seconds + time.perf_counter() - start, 3),
            "images_per_second": round(trained / max(seconds, 1e-9), 3),
            "times": {part: round(value, 3) for part, value in self.seconds.items()},
        }
        state.history.append(record)
        state.losses = []
        self.seconds, self.trained_images = dict.fromkeys(PARTS, 0.0), 0
        if self.report:
            self.report.epoch(record)
            # The best first: an interruption between the two files repeats the validation, which writes both again.
            if scores["miou"] is not None and (best is None or scores["miou"] > best):
                state.save_best()
            state.save()
            self.report.draw_curves()
            self.report.pictures(state.step, self._pictures())
        for callback in self.callbacks:
            callback.on_validation(record)

    def _pictures(self) -> list[Picture]:
        config, state = self.config, self.state
        autocast = torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None
        model, classes = self.trained.validated, len(state.class_names)
        return validation_pictures(model, self.val_set, classes, state.metadata, self.device, autocast)

    def _warn_of_no_label(self, split: str, dataset: Dataset[Item], consequence: str) -> None:
        """Say once that no pixel of a split is labelled, naming its list where it is known."""
        if split not in self.told and self.world.first:
            self.told.add(split)
            name = getattr(dataset, "source", f"{split}_set")
            warnings.warn(
                f"{name}: no pixel has a label, all are {IGNORE_INDEX} (ignored): {consequence}", stacklevel=5
            )


class _Pending:
    """Iterations not yet looked at: their learning rates and values on the device."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.lrs: list[float] = []
        self.values: list[Tensor] = []


def _seed(place: tuple[int, ...]) -> None:
    """Make torch's random numbers, which drive dropout, those of an iteration and process."""
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
