"""The group of all commands: what of an error a user sees."""

from typing import Any

import click

EXTRAS = {"numpy", "omegaconf", "yaml", "cv2", "PIL", "tqdm", "matplotlib", "tensorboard"}


class Group(click.Group):
    """Turns the errors that users can mend into one line on stderr: exit code 2 for the configuration, else 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if ctx.params["traceback"] or (error.name or "").partition(".")[0] not in EXTRAS:
                raise
            message = f"this command needs {error.name}: pip install 'pspnet_fast[train]'"
            raise click.ClickException(message) from None
        except (ValueError, OSError, FloatingPointError) as error:
            if ctx.params["traceback"]:
                raise
            message = str(error)
            if isinstance(error, OSError) and error.strerror:
                message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            # The configuration is part of the command, so its errors are errors of usage (click's exit code 2).
            kind = click.UsageError if type(error).__name__ == "ConfigError" else click.ClickException
            raise kind(message) from None
        except RuntimeError as error:
            if ctx.params["traceback"] or type(error).__name__ != "OutOfMemoryError":
                raise
            message = "out of GPU memory; try a smaller train.batch_size or data.crop, or train.bf16=true"
            raise click.ClickException(message) from None
