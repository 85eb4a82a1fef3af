"""A model's folder: config.json, model.safetensors and a model card."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pspnet_fast.convert.weights import read_weights
from pspnet_fast.files import replacing

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, CARD)
_WHAT = f"a folder of {CONFIG} and {WEIGHTS} that save_pretrained or `pspnet-fast convert` wrote"
_NEEDS = "needs the package safetensors: pip install 'pspnet_fast[hub]'"
_IMAGE = {"color_order": "RGB", "scale": 1 / 255}


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError if a model's folder cannot be written here without replacing files, unless it may be."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; a model needs a folder")
    existing = [name for name in FILES if (folder / name).exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{folder}: holds {', '.join(existing)} already; overwrite replaces them")


def write_folder(
    folder: Path,
    classes: int,
    arguments: Mapping[str, Any],
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write a model: each file whole or not at all, the weights first.

    Args:
        classes, arguments: of :class:`pspnet_fast.PSPNet`, plain data.
        metadata: plain data; ``mean`` and ``std`` are of RGB images in 0..1.

    Raises:
        FileExistsError: files of a model are there and may not be overwritten.
        ModuleNotFoundError: the package safetensors is missing.
        OSError: the disk is full, or the like.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise ModuleNotFoundError(f"a model's folder {_NEEDS}", name="safetensors") from None
    check_free(folder, overwrite)
    config = {"format": FORMAT, "model_type": "pspnet_fast", "classes": classes, "model": dict(arguments)}
    rest = {name: value for name, value in metadata.items() if name not in ("mean", "std")}
    image = {**_IMAGE, **{name: list(metadata[name]) for name in ("mean", "std") if name in metadata}}
    text = json.dumps({**config, "image": image, **rest}, indent=2, ensure_ascii=False) + "\n"
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    data = save(tensors, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (WEIGHTS, data),
        (CONFIG, text.encode()),
        (CARD, card(classes, arguments, metadata).encode()),
    ):
        with replacing(folder / name, len(content)) as file:
            file.write(content)


def read_folder(folder: Path) -> tuple[int, dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Number of classes, arguments, weights and metadata of a model's folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of something else, or safetensors is missing; the message says which.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {folder / name}; expected {_WHAT}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: is damaged, no JSON ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "pspnet_fast":
        raise ValueError(f"{folder / CONFIG}: describes no model of pspnet_fast; expected {_WHAT}")
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG}: is of format {config.get('format')}; this version reads {FORMAT}")
    for key, kind, what in (("classes", int, "a number"), ("model", dict, "a mapping"), ("image", dict, "a mapping")):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{folder / CONFIG}: {key} must be {what}, is {config.get(key)!r}")
    image = config["image"]
    for name, value in _IMAGE.items():
        if image.get(name, value) != value:
            raise ValueError(f"{folder / CONFIG}: image.{name} must be {value!r}, is {image[name]!r}")
    own = ("format", "model_type", "classes", "model", "image")
    metadata = {key: value for key, value in config.items() if key not in own}
    metadata |= {name: image[name] for name in ("mean", "std") if name in image}
    return config["classes"], config["model"], read_weights(folder / WEIGHTS).tensors, metadata


def as_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A model's folder in the form of a checkpoint of the trainer: ``model``, ``class_names`` and ``metadata``."""
    classes, arguments, state, metadata = read_folder(Path(folder))
    names = metadata.pop("class_names", None) or [f"class {index}" for index in range(classes)]
    if len(names) != classes:
        raise ValueError(f"{Path(folder) / CONFIG}: has {len(names)} class_names for {classes} classes")
    return {"model": state, "class_names": names, "metadata": {**metadata, "model": arguments}}


def card(classes: int, arguments: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """A model card: what the model is, what images it takes, where its weights are from, how it is used."""
    source = metadata.get("source")
    untrained = metadata.get("untrained")
    backbone = arguments.get("backbone")
    lines = [
        *("---", "library_name: pspnet_fast", "pipeline_tag: image-segmentation"),
        *("tags:", "- semantic-segmentation", "- pspnet", f"- {backbone}", "---", ""),
        *(f"# PSPNet, {backbone}, {classes} classes", ""),
    ]
    if untrained:
        lines += [f"**Not trained: {untrained}.** It has to be trained before it predicts anything.", ""]
    if isinstance(source, Mapping):
        lines += [f"Weights: {source.get('file', 'a file')} of {source.get('package', 'unknown origin')}.", ""]
        for title, sentences in (("Assumed, as the weights do not tell:", source.get("assumed")),):
            if sentences:
                lines += [title, "", *(f"- {sentence}" for sentence in sentences), ""]
    image = {**_IMAGE, **{name: metadata[name] for name in ("mean", "std") if name in metadata}}
    lines += [
        *("## Images", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in image.items()), ""),
        *("## Model", "", "| argument | value |", "|---|---|"),
        *(f"| {name} | {value} |" for name, value in arguments.items()),
        "",
    ]
    if names := metadata.get("class_names"):
        lines += ["## Classes", "", ", ".join(f"{index} {name}" for index, name in enumerate(names)), ""]
    lines += [
        *("## Use", "", "```", "pspnet-fast predict photo.jpg --checkpoint FOLDER --out labels", "```", ""),
        *("```python", "from pspnet_fast import Predictor, PSPNet", ""),
        *('labels = Predictor.from_checkpoint("FOLDER")("photo.jpg")  # (H, W), a class index a pixel',),
        *('model = PSPNet.from_pretrained("FOLDER")  # normalised images -> {"out": logits}', "```", ""),
    ]
    return "\n".join(lines)
