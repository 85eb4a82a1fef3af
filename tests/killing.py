"""A toy run that is killed at random moments and resumed, over and over; as a test and a script do it."""

import multiprocessing
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import torch
from toy_training import CONFIG, assert_equal_states, train

from pspnet_fast.training import TrainConfig
from pspnet_fast.training.checkpoint import load_checkpoint
from pspnet_fast.training.report import read_log

_RUN = replace(CONFIG, epochs=16, val_epochs=4, checkpoint_every=3, log_every=2, workers=1)
RUNS = {
    "sgd": _RUN,
    "adamw, averaged weights, warm-up": replace(_RUN, optimizer="adamw", lr=0.002, ema=0.9, warmup=5, clip_norm=1.0),
    "float16, parts": replace(_RUN, fp16=True, accumulate=2, workers=0),
}


def kill_and_resume(
    root: Path, out: Path, config: TrainConfig, seed: int, kills: int, delay: float
) -> tuple[int, set[int]]:
    """Run to the end, killed by SIGKILL ``kills`` times at most, each within ``delay`` seconds of its start.

    Returns the number of kills, and the iterations at which the run went on.
    """
    chances, done, steps = random.Random(seed), 0, set()
    fork = multiprocessing.get_context("fork")  # imports torch once
    while True:
        path = out / "checkpoint.pt"
        if path.exists():
            steps.add(load_checkpoint(path)["step"])
        process = fork.Process(target=_train, args=(root, out, config, path.exists()))
        process.start()
        process.join(chances.uniform(0, delay) if done < kills else None)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
            done += 1
        elif process.exitcode == 0:
            return done, steps
        else:
            raise AssertionError(f"the run ended with exit status {process.exitcode}")


def _train(root: Path, out: Path, config: TrainConfig, resume: bool) -> None:
    torch.set_num_threads(1)
    train(root, out, config, resume=resume)


def assert_same_runs(first: Path, second: Path) -> None:
    """Both folders hold the same weights, states, scores and log."""
    for name in ("checkpoint.pt", "best.pt"):
        states = [load_checkpoint(folder / name) for folder in (first, second)]
        for state in states:
            del state["config"]["workers"], state["config"]["log_every"]
        assert_equal_states(*states)
    assert_equal_states(*(read_log(folder / "log.jsonl")[1:] for folder in (first, second)))
