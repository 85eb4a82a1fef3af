"""What a training run tells others, such as wandb or mlflow."""

from collections.abc import Mapping
from typing import Any


class Callback:
    """Methods that the trainer calls in its first process, in the order of the iterations; by default they do nothing.

    A resumed run goes on where its checkpoint was, so an iteration can be told twice, before and after a crash.
    """

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """After iteration ``step``, from 1: "loss" and "lr"; every ``log_every`` iterations, for all of them."""

    def on_validation(self, record: Mapping[str, Any]) -> None:
        """After a validation, with what ``history`` of a checkpoint holds of it (docs/checkpoints.md)."""

    def on_end(self, result: Any) -> None:
        """After the last iteration, with the :class:`TrainResult`; not after an error or an interruption."""
