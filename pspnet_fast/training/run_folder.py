"""A run and its folder: one process in it at a time, and what a resumed run may change."""

import dataclasses
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pspnet_fast.training.config import Config

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"
FINITE = "finite.pt"
# A resumed run may differ from its beginning in these; every other setting changes the result.
FREE = tuple(
    f"train.{name}" for name in ("device", "workers", "log_every", "val_batch_size", "checkpoint_every", "keep")
)
# These cannot change within a run: they are the meaning of the outputs and of a place in an epoch.
FIXED = ("class_names", "iterations per epoch")


class ResumeError(ValueError):
    """A run that cannot go on as asked; ``changed`` names the settings in question, none where nothing would help."""

    def __init__(self, message: str, changed: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.changed = list(changed)


def settings_of_run(
    config: Mapping[str, Any], iterations: int, class_names: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Every setting that makes a run what it is, by its key; ``config`` is that of training."""
    settings = {f"train.{name}": value for name, value in config.items()}
    settings |= {"class_names": list(class_names), "iterations per epoch": iterations}
    for name, value in metadata.items():
        if isinstance(value, Mapping):
            settings |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            settings[{"mean": "data.mean", "std": "data.std"}.get(name, name)] = value
    return {name: value for name, value in settings.items() if name not in FREE}


def with_defaults(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an older version's run with the defaults of those it did not have."""
    sections = {entry.name: entry.type() for entry in dataclasses.fields(Config)}  # type: ignore[operator]
    known = {
        f"{section}.{name}": value
        for section, settings in sections.items()
        for name, value in dataclasses.asdict(settings).items()
    }
    return {**{key: known[key] for key in now if key in known}, **saved}


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path, allow: Collection[str] = ()) -> None:
    """Refuse to go on from ``path`` under other settings than those of its run, but for those in ``allow``.

    Raises:
        ResumeError: a setting changed; the message has all of them with both values.  ValueError: ``allow`` names
            something else than a setting that may be allowed.
    """
    if wrong := sorted(name for name in allow if name in FIXED or name not in {**saved, **now}):
        raise ValueError(
            f"{wrong[0]} cannot be allowed to change: it is no setting of the run in {path}, may change anyway "
            f"({', '.join(FREE)}) or never ({', '.join(FIXED)})"
        )
    changed = [name for name in {**saved, **now} if saved.get(name) != now.get(name) and name not in allow]
    if not changed:
        return
    message = f"cannot resume {path}: " + "; ".join(
        _difference(name, saved.get(name), now.get(name)) for name in changed
    )
    if "train.epochs" in changed:
        message += "; the learning rate would fall to 0 over the new number of epochs"
    if fixed := [name for name in changed if name in FIXED]:
        raise ResumeError(f"{message}; {' and '.join(fixed)} cannot change within a run")
    raise ResumeError(f"{message}; only {', '.join(FREE)} change nothing in the result", changed)


def _difference(name: str, old: Any, new: Any) -> str:
    lists = isinstance(old, list | tuple) and isinstance(new, list | tuple)
    if lists and max(len(old), len(new)) > 4:
        if len(old) != len(new):
            return f"{name} had {len(old)} entries, now {len(new)}"
        index = next(index for index, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
        name, old, new = f"{name}[{index}]", old[index], new[index]
    return f"{name} was {old!r}, now {new!r}"


def previous_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints kept beside the last one, the newest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


def keep_checkpoint(path: Path, step: int, count: int) -> None:
    """Give the checkpoint ``path`` of iteration ``step`` a second name, and delete all kept ones but ``count``.

    It stays where it is, so that there is one at every moment.
    """
    if path.exists() and count:
        kept = path.with_name(f"checkpoint-{step:08}.pt")
        kept.unlink(missing_ok=True)
        try:
            os.link(path, kept)
        except OSError:  # file systems without links
            shutil.copyfile(path, kept)
    for old in previous_checkpoints(path.parent)[count:]:
        old.unlink()


_held: set[int] = set()  # descriptors that hold a lock, which lasts as long as any process has one open


def _let_go() -> None:
    """In a loading process: it may outlive one that was killed by some seconds, and is no run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the operating system gives it back even if the process is killed.

    Raises:
        ValueError: a process that lives holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training into {folder}: choose another folder") from None
        except OSError:
            pass  # some network file systems lock no folders
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)
