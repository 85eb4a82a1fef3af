"""This package's own checkpoints and folders, as a model."""

import zipfile
from pathlib import Path

from pspnet_fast.convert.report import Report
from pspnet_fast.models.folder import CONFIG, as_checkpoint
from pspnet_fast.models.pspnet import PSPNet

SOURCE = "pspnet_fast"


def is_own(path: Path) -> bool:
    """Whether a file is a checkpoint of the trainer, or a folder that save_pretrained wrote."""
    if path.is_dir():
        return (path / CONFIG).is_file() and f'"{SOURCE}"' in (path / CONFIG).read_text(encoding="utf-8")
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # whatever is wrong, reading it in earnest says so
        return False
    return isinstance(state, dict) and {"format", "metadata", "class_names"} <= state.keys()


def convert_own(path: Path, classes: int | None) -> tuple[PSPNet, Report]:
    """A checkpoint's model with what the checkpoint knows of it.

    Raises:
        FileNotFoundError, ValueError: as ``load_checkpoint`` and ``PSPNet.from_pretrained`` raise them; or the model is
            not described by plain data.
    """
    from pspnet_fast.training.checkpoint import load_checkpoint

    checkpoint = as_checkpoint(path) if path.is_dir() else load_checkpoint(path)
    metadata, names = checkpoint["metadata"], list(checkpoint["class_names"])
    if not isinstance(metadata.get("model"), dict):
        raise ValueError(f"{path}: does not describe its model: metadata['model'] must be the arguments of PSPNet")
    report = Report("pspnet_fast, its own checkpoint")
    state = dict(checkpoint["model"])
    if changed := classes is not None and classes != len(names):
        report.reinitialised = [name for name in state if name.startswith(("cls.4.", "aux.4."))]
        for name in report.reinitialised:
            del state[name]
            report.dropped[name] = f"a classifier of {len(names)} classes"
        report.warnings.append(
            f"{len(names)} classes became {classes}: the classifiers ({', '.join(report.reinitialised)}) are random, "
            "train them first"
        )
    try:
        model = PSPNet(classes or len(names), **metadata["model"])
        absent, unexpected = model.load_state_dict(state, strict=False)
    except (TypeError, RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights are not those of the PSPNet it describes ({first})") from None
    if wrong := [*unexpected, *(name for name in absent if name not in report.reinitialised)]:
        raise ValueError(f"{path}: its weights are not those of the PSPNet it describes ({wrong[0]})")
    report.loaded = list(state)
    report.model = f"PSPNet, {metadata['model'].get('backbone', 'resnet50')}, {model.classes} classes"
    report.known.append("all conventions, by the checkpoint")
    kept = {name: metadata[name] for name in ("mean", "std", "colors", "source", "untrained") if name in metadata}
    if changed:
        kept.pop("colors", None)
        kept["untrained"] = "the classifiers are random, as the number of classes was changed"
    else:
        kept["class_names"] = names
    kept.setdefault("source", {"package": "pspnet_fast", "file": path.name})
    model.metadata = kept
    return model, report
