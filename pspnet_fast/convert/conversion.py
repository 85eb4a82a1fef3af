"""From a file of another package to a PSPNet."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pspnet_fast.convert import mmseg
from pspnet_fast.convert.architecture import (
    BINS,
    CLASSIFIERS,
    add_background,
    count_classes,
    count_levels,
    describe,
    fold_biases,
    has_head,
    reverse_levels,
    turn_colors,
)
from pspnet_fast.convert.own import convert_own, is_own
from pspnet_fast.convert.report import Report, shortened
from pspnet_fast.convert.selftest import self_test
from pspnet_fast.convert.source import Renamed, Source, unwrap
from pspnet_fast.convert.sources import SOURCES, recognise
from pspnet_fast.convert.weights import Weights, read_weights
from pspnet_fast.models.pspnet import PSPNet

CONVENTIONS = ("dilation", "output_stride", "align_corners", "bins", "concat")
_COUNTER = "num_batches_tracked"  # of batch norms, which old versions of torch and Paddle do not count


class Conversion(NamedTuple):
    """A model, in evaluation mode and with its ``metadata``, and the report on how it came about."""

    model: PSPNet
    report: Report


def convert(
    checkpoint: str | os.PathLike[str],
    source: str = "auto",
    *,
    classes: int | None = None,
    class_names: Sequence[str] | None = None,
    colors: Sequence[Sequence[int]] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bgr: bool = False,
    strict: bool = True,
    **conventions: Any,
) -> Conversion:
    """Make a PSPNet of a checkpoint of another package, or of a backbone alone.

    Args:
        checkpoint: a file of torch.save that needs no pickled objects, ``.safetensors`` or ``.npz``, a folder with one,
            or a checkpoint of this package's trainer.
        source: a name in ``SOURCES``, "pspnet_fast", or "auto", which goes by names and shapes.
        classes: K; another one than the file's leaves the classifiers random, and them alone. Needed for a backbone.
        class_names, colors: by class; without them those that the checkpoint names, else "class 0", ...
        mean, std: per channel, of RGB images in 0..1, in place of the source's.
        bgr: whether the source's model takes BGR images; its first convolution is turned, so that the result takes RGB.
            mean and std are then those of B, G and R.
        strict: raise where something of the model stays unset, or an entry is unknown.
        conventions: dilation, output_stride, align_corners, bins, concat of :class:`PSPNet`, in place of the source's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, needs pickle, is of no or another source, or something stays unset; an argument
            is outside its range; or the self-test found other outputs than the package's. The message says which.
    """
    if wrong := set(conventions) - set(CONVENTIONS):
        raise ValueError(f"{', '.join(sorted(wrong))}: no conventions; known are {', '.join(CONVENTIONS)}")
    path = Path(checkpoint)
    given = {name: value for name, value in conventions.items() if value is not None}
    settings = {"class_names": class_names, "colors": colors, "mean": mean, "std": std}
    if source == "pspnet_fast" or (source == "auto" and is_own(path)):
        if given or bgr:
            raise ValueError(f"{path}: its checkpoint tells its conventions ({', '.join([*given] or ['bgr'])})")
        model, report = convert_own(path, classes)
        _describe_classes(model, report, {**model.metadata, **_given(settings)})
        return Conversion(model.eval(), report)
    weights = read_weights(path)
    tensors = unwrap(weights.tensors)
    of = _source(source, tensors, path)
    renamed = of.rename(tensors, path)
    report = Report(of.title, dropped=renamed.dropped, unknown=renamed.unknown)
    if classes is None and class_names is not None and count_classes(renamed.weights) is None:
        classes = len(class_names)
    model = _build(of, renamed, weights, classes, given, report)
    if bgr:
        turn_colors(renamed.weights)
        report.changed.append("the first convolution was turned to take RGB instead of BGR images")
    model = _load(model, renamed, report)
    _check(path, model, report, strict)
    metadata = _metadata(of, weights, report, settings, bgr)
    _describe_classes(model, report, metadata)
    model.eval()
    report.self_test = self_test(of.name, tensors, model, changed=bool(given) or bgr or bool(report.reinitialised))
    return Conversion(model, report)


def _source(name: str, tensors: Mapping[str, Tensor], path: Path) -> Source:
    if name == "auto":
        return recognise(tensors, path)
    if name not in SOURCES:
        raise ValueError(f"source must be one of auto, pspnet_fast, {', '.join(SOURCES)}, got {name!r}")
    of = SOURCES[name]
    if not of.has(tensors):
        raise ValueError(f"{path}: has not the names of {of.title}, but of {recognise(tensors, path).title}")
    return of


def _build(
    of: Source, renamed: Renamed, weights: Weights, classes: int | None, given: Mapping[str, Any], report: Report
) -> PSPNet:
    """The model that the shapes describe, with the source's conventions and those that were given; without values."""
    shapes, path = renamed.weights, weights.path
    told = mmseg.read_meta(weights.rest)[0] if of.name == "mmseg" else {}
    arguments = {**of.conventions, **told, **given, **describe(shapes, path)}
    whole = has_head(shapes)
    arguments.setdefault("output_stride", 8)
    if arguments["backbone"] in ("resnet18", "resnet34") and not of.dilates_second and arguments["output_stride"] < 32:
        raise ValueError(
            f"{path}: {of.title} dilates the first convolution alone of {arguments['backbone']}'s blocks, "
            "for which PSPNet has no argument; resnet50, 101 and 152 convert"
        )
    if whole and (levels := count_levels(shapes)) != len(arguments.setdefault("bins", BINS)):
        raise ValueError(f"{path}: has {levels} levels, bins are {arguments['bins']}; name as many bins")
    if count_classes(shapes) == 1 and classes in (None, 2):
        add_background(shapes)
        report.changed.append("one output, taken as that of a sigmoid, became two classes: 1 where it is above 0.5")
    own_classes = count_classes(shapes)
    if classes is None and own_classes is None:
        raise ValueError(f"{path}: is a backbone without a head; name the number of classes")
    with torch.device("meta"):
        model = PSPNet(classes or own_classes or 0, **arguments)
    assert model.config is not None
    report.model = f"PSPNet, {arguments['backbone']}, stem {arguments['stem']}, {model.classes} classes"
    _tell(of, model.config, told, given, whole, report)
    if not whole:
        report.warnings.append("the file holds a backbone alone: pyramid and classifier are random, train them first")
        model.metadata["untrained"] = "pyramid and classifier are random, the backbone alone is loaded"
    if own_classes is not None and own_classes != model.classes:
        for name in [name for name in shapes if name.startswith(CLASSIFIERS)]:
            del shapes[name]
            report.dropped[renamed.names[name]] = f"a classifier of {own_classes} classes"
            report.reinitialised.append(name)
        report.warnings.append(
            f"{own_classes} classes became {model.classes}: the classifiers ({', '.join(report.reinitialised)}) "
            "are random, train them first"
        )
        model.metadata["untrained"] = "the classifiers are random, as the number of classes was changed"
    if folded := fold_biases(shapes):
        report.changed.append(f"{len(folded)} biases were folded into running means: {shortened(folded)}")
    if of.reversed_levels and whole:
        reverse_levels(shapes, len(arguments["bins"]))
        report.changed.append("the bottleneck's channels were reordered: its levels stood in reverse")
    for name in [name for name in shapes if name.startswith(("layer3.", "layer4.")) and not hasattr(model, name[:6])]:
        del shapes[name]
        report.dropped[renamed.names[name]] = f"behind layer{arguments['stages']}, where the pyramid stands"
    return model


def _tell(
    of: Source,
    config: Mapping[str, Any],
    told: Mapping[str, Any],
    given: Mapping[str, Any],
    whole: bool,
    report: Report,
) -> None:
    """Which conventions are known, and which are taken for granted."""
    dilated = config["output_stride"] < 2 ** (config["stages"] + 1)
    names = [name for name in CONVENTIONS if name != "dilation" or dilated] if whole else ["dilation"]
    for name in names:
        value = f"{name}={config[name]}"
        if name in given:
            report.known.append(f"{value}, as was asked for")
        elif name in told:
            report.known.append(f"{value}, as the checkpoint's configuration says")
        elif name == "output_stride" and config["stages"] == 2:
            report.known.append(f"{value}, that of layer2")
        elif name == "dilation" and not whole:
            report.assumed.append(f"{value}, as {of.title} dilates this backbone; it was trained without dilation")
        else:
            report.assumed.append(f"{value}, as {of.title} builds it: names and shapes do not show it")
    for name in ("backbone", "stem", "avg_down", "stages"):
        report.known.append(f"{name}={config[name]}, by names and shapes")


def _load(model: PSPNet, renamed: Renamed, report: Report) -> PSPNet:
    """The same model with the file's values, and random ones where it has none."""
    shapes = {name: value.shape for name, value in renamed.weights.items()}
    unset = [name for name, value in model.state_dict().items() if shapes.get(name) != value.shape]
    if all(name.endswith(_COUNTER) for name in unset):
        model.to_empty(device="cpu")
        for name in unset:
            model.get_buffer(name).zero_()
    else:
        assert model.config is not None
        metadata, model = model.metadata, PSPNet(model.classes, **model.config)
        model.metadata = metadata
    own = model.state_dict()
    for name, value in own.items():
        tensor = renamed.weights.get(name)
        if tensor is None:
            if name not in report.reinitialised and not name.endswith(_COUNTER):
                report.missing.append(name)
        elif tensor.shape != value.shape:
            both = f"{tuple(tensor.shape)} in the file, {tuple(value.shape)} in the model"
            report.mismatched.append(f"{renamed.names[name]} ({both})")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{renamed.names[name]}: holds numbers that are not finite")
        else:
            value.copy_(tensor)
            report.loaded.append(name)
            if renamed.names[name] != name:
                report.remapped[renamed.names[name]] = name
    report.unknown += [renamed.names[name] for name in renamed.weights if name not in own]
    return model


def _check(path: Path, model: PSPNet, report: Report, strict: bool) -> None:
    """Raise where something stays unset; a head that is missing as a whole was said."""
    untrained = any("backbone alone" in warning for warning in report.warnings)
    missing = [name for name in report.missing if not (untrained and name.startswith(("ppm.", "cls.", "aux.")))]
    wrong = [
        f"{what} {shortened(names)}"
        for what, names in (
            ("lacks", missing),
            ("has another shape:", report.mismatched),
            ("has entries of which nothing is known:", report.unknown),
        )
        if names
    ]
    if not wrong:
        return
    text = f"{path} ({report.source}): {'; '.join(wrong)}"
    if strict:
        raise ValueError(f"{text}; without strict the rest would be loaded, and the result would be another model")
    report.warnings.append(text)
    if missing or report.mismatched:
        model.metadata["untrained"] = f"{shortened([*missing, *report.mismatched])} are random"


def _metadata(of: Source, weights: Weights, report: Report, settings: Mapping[str, Any], bgr: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {"mean": list(of.mean), "std": list(of.std)}
    if of.name == "mmseg" and not report.reinitialised:
        metadata |= mmseg.read_meta(weights.rest)[1]
    metadata |= _given(settings)
    if bgr:
        for name in ("mean", "std"):
            metadata[name] = metadata[name][::-1] if settings[name] is not None else metadata[name]
    report.assumed.append(f"{'BGR' if bgr else 'RGB'} images, as {of.title} reads them")
    if settings["mean"] is None or settings["std"] is None:
        report.assumed.append(f"mean {metadata['mean']} and std {metadata['std']} of images in 0..1")
    metadata["source"] = {
        "package": of.title,
        "file": weights.path.name,
        "assumed": report.assumed,
        "changed": report.changed,
    }
    return metadata


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not None, as plain data."""
    plain = {name: list(value) for name, value in settings.items() if value is not None}
    if "colors" in plain:
        plain["colors"] = [[int(value) for value in color] for color in plain["colors"]]
    for name in ("mean", "std"):
        if name in plain and len(plain[name]) != 3:
            raise ValueError(f"{name} must be three numbers, of red, green and blue, got {plain[name]}")
    if min(plain.get("std", [1])) <= 0:
        raise ValueError(f"std must be above 0, got {plain['std']}")
    return plain


def _describe_classes(model: PSPNet, report: Report, metadata: dict[str, Any]) -> None:
    """Names and colours of as many classes as the model has."""
    for name in ("class_names", "colors"):
        if name in metadata and len(metadata[name]) != model.classes:
            raise ValueError(f"{name} must be {model.classes}, one a class, got {len(metadata[name])}")
    if "class_names" not in metadata:
        metadata["class_names"] = [f"class {index}" for index in range(model.classes)]
        report.assumed.append("class names: none are known, the classes are called class 0, class 1, ...")
    model.metadata |= metadata
