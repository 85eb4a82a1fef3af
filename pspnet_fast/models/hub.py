"""Models to and from folders, and the Hub of Hugging Face."""

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pspnet_fast.models import folder as files

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """What :class:`pspnet_fast.PSPNet` can do with folders and the Hub.

    Attributes:
        metadata: plain data that goes with the weights and that the model itself makes no use of: ``class_names``,
            ``colors`` ([red, green, blue] by class), ``mean`` and ``std`` (of RGB images in 0..1), ``source``.
    """

    classes: int
    config: dict[str, Any] | None
    metadata: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write ``config.json`` (arguments and ``metadata``), ``model.safetensors`` and a model card ``README.md``.

        Needs the package safetensors.

        Raises:
            FileExistsError: the folder holds such files and ``overwrite`` is false.
            ValueError: the model is no plain data: its backbone is a module, or its norm is no BatchNorm2d.
        """
        if self.config is None:
            raise ValueError("a model with a backbone given as a module, or another norm_layer, has no config to save")
        state = self.state_dict()
        files.write_folder(Path(folder), self.classes, self.config, state, self.metadata, overwrite=overwrite)

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | os.PathLike[str], *, revision: str | None = None) -> Model:
        """Build a model, in evaluation mode, from a folder of :meth:`save_pretrained` or ``pspnet-fast convert``.

        Args:
            folder: a folder, from which nothing is fetched; or, where there is no such folder, a name of the Hub such
                as "owner/model", whose config.json and model.safetensors are fetched. That needs pspnet_fast[hub].
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: no such folder, or a file is missing in it.
            ModuleNotFoundError: a name of the Hub without the package huggingface_hub.
            ValueError: a file is damaged, or the weights are not those of the model that config.json describes.
        """
        path = Path(folder)
        if not path.is_dir():
            if Path(folder).is_absolute() or str(folder).count("/") != 1:
                raise FileNotFoundError(f"no folder {folder}, and no name of the Hub, which is OWNER/MODEL")
            path = _download(str(folder), revision)
        classes, arguments, state, metadata = files.read_folder(path)
        try:
            with torch.device("meta"):  # no random values, which all would be replaced
                model = cls(classes, **arguments)
            model.to_empty(device="cpu").load_state_dict(state)
        except (TypeError, RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: its weights are not those of the PSPNet it describes ({first})") from None
        model.metadata = metadata
        return model.eval()

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload what :meth:`save_pretrained` writes, by huggingface_hub's ModelHubMixin.

        Args:
            repo_id: "owner/model"; made if it does not exist.
            settings: of ``ModelHubMixin.push_to_hub``: commit_message, private, token, branch, create_pr, ...

        Returns:
            The URL of the commit.

        Raises:
            ModuleNotFoundError: the package huggingface_hub is missing: pip install 'pspnet_fast[hub]'.
        """
        try:
            from huggingface_hub import ModelHubMixin
        except ImportError:
            raise _missing("push_to_hub") from None
        model = self

        class Upload(ModelHubMixin):
            """Its hook for what is uploaded."""

            def _save_pretrained(self, save_directory: Path) -> None:
                model.save_pretrained(save_directory)

        return Upload().push_to_hub(repo_id, **settings)


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise _missing(f"no folder {name}; a model of the Hub") from None
    return Path(snapshot_download(name, revision=revision, allow_patterns=[files.CONFIG, files.WEIGHTS]))


def _missing(what: str) -> ModuleNotFoundError:
    message = f"{what} needs the package huggingface_hub: pip install 'pspnet_fast[hub]'"
    return ModuleNotFoundError(message, name="huggingface_hub")
