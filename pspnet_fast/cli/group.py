"""The group of all commands: what of an error a user sees."""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from pspnet_fast.out_of_memory import is_out_of_memory

EXTRAS = dict.fromkeys(("numpy", "yaml", "cv2", "PIL", "tqdm", "matplotlib", "tensorboard"), "train")
EXTRAS |= {"pycocotools": "coco", "jinja2": "report", "vl_convert": "report"}
EXTRAS |= {"safetensors": "hub", "huggingface_hub": "hub"}
EXTRAS |= dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "openvino"), "export") | {"coremltools": "coreml"}


class Stopped(click.ClickException):
    """The command ended early; ``exit_code`` is 128 and the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


class Group(click.Group):
    """Turns the errors that users can mend into one line on stderr: exit code 2 for the configuration, else 1."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # class and file names may hold what the terminal's encoding lacks
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            with _short_warnings():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `| head`; click ends quietly
        except KeyboardInterrupt:
            if ctx.params["traceback"]:
                raise
            raise Stopped("interrupted", 130) from None
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if ctx.params["traceback"] or extra is None:
                raise
            message = f"this command needs {error.name}: pip install 'pspnet_fast[{extra}]'"
            raise click.ClickException(message) from None
        except (ValueError, OSError, FloatingPointError) as error:
            if ctx.params["traceback"]:
                raise
            # The configuration is part of the command, so its errors are errors of usage (click's exit code 2).
            kind = click.UsageError if type(error).__name__ == "ConfigError" else click.ClickException
            raise kind(sentence(error)) from None
        except Exception as error:  # of OpenCV too, whose errors have no common base with others
            hint = _hint(error, ctx.invoked_subcommand)
            if ctx.params["traceback"] or hint is None:
                raise
            raise click.ClickException(hint) from None


def sentence(error: Exception) -> str:
    """What an error says, of a file its name first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _hint(error: Exception, command: str | None) -> str | None:
    """What to do about an error of the machine; None for errors of the program."""
    text = str(error)
    train = "a smaller train.batch_size or data.crop"
    less = "--crop, --memory or a smaller train.val_batch_size" if command == "eval" else train
    if is_out_of_memory(error):
        if type(error).__name__ == "OutOfMemoryError":
            return f"out of GPU memory; try {less}, or train.bf16=true"
        return f"out of memory; try {less}, or fewer train.workers"
    if "DataLoader worker" in text:
        if "shared memory" in text:
            return (
                f"a loading process ran out of shared memory (/dev/shm); try fewer train.workers, 0 for none, or {less}"
            )
        by = re.search(r"killed by signal: (\w+( \w+)*)", text)
        how = f"was killed by the signal {by[1]}" if by else "ended unexpectedly"
        return f"a loading process {how}, most often for want of memory; try fewer train.workers, 0 for none, or {less}"
    return None


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line without the place in the code that gave them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
