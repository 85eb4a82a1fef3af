"""Backbone weights that others trained, recognised by their keys and shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pspnet_fast.models.resnet import BACKBONES, STEMS, BasicBlock, Bottleneck

LAYERS = ("layer0", "layer1", "layer2", "layer3", "layer4")
_CONTAINERS = ("state_dict", "model", "model_state", "network")
_PREFIXES = ("module.", "backbone.", "encoder.", "pretrained.", "model.")
# The stem's layers as others name them -> index in layer0. Of one 7x7 convolution and of three 3x3 ones.
_CONV7 = {"conv1": "0", "bn1": "1"}
_DEEP = {
    "semseg": {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "conv3": "6", "bn3": "7"},
    "timm": {"conv1.0": "0", "conv1.1": "1", "conv1.3": "3", "conv1.4": "4", "conv1.6": "6", "bn1": "7"},
    "mmsegmentation": {f"stem.{index}": str(index) for index in (0, 1, 3, 4, 6, 7)},
}
_LAYER = re.compile(r"(layer[1-4]\.\d+\.(conv|bn)[123]|layer[1-4]\.\d+\.downsample\.[012])\.(\w+)")


@dataclass(frozen=True)
class Loaded:
    """What of a file went into a backbone.

    Attributes:
        layout: whose names the file has.
        loaded: the backbone's entries that were filled.
        skipped: the file's entries that are none of the backbone, such as fc.
        missing: the backbone's entries that the file lacks: at most batch norms' num_batches_tracked.
    """

    layout: str
    loaded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        skipped = ", ".join(self.skipped[:4]) + (", ..." if len(self.skipped) > 4 else "")
        text = f"{len(self.loaded)} entries loaded ({self.layout} layout), {len(self.skipped)} skipped"
        return f"{text}{skipped and f' ({skipped})'}, {len(self.missing)} missing"


def load_backbone(model: nn.Module, file: Path | str) -> Loaded:
    """Load a ResNet's weights into ``layer0`` .. ``layer4`` of a model, and leave its head as it is.

    Knows the names of torchvision and timm (``resnet18`` .. ``resnet152``, timm's deep stems ``resnet50s`` and
    ``resnet50c``), of semseg's ``resnet50_v2.pth`` and of mmsegmentation's ResNetV1c, and a PSPNet's own; in a
    checkpoint the entry ``state_dict`` or ``model``, with prefixes such as ``module.`` or ``backbone.``.

    Args:
        model: a :class:`PSPNet` or :func:`resnet` of this package.
        file: ``.safetensors`` (needs the package safetensors), else a file of torch.save, read with weights_only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no such weights, or those of another backbone or stem; the message names the one to choose.
            The model is as it was then.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no weights {path}")
    weights = _strip(_read(path), path)
    layout, stem = _recognise(weights, path)
    renamed, skipped = _rename(weights, stem)
    own = {name: value for name, value in model.state_dict().items() if name.partition(".")[0] in LAYERS}
    _check(renamed, own, layout, path)
    missing = [name for name in own if name not in renamed]
    for name, value in renamed.items():
        own[name].copy_(value)
    return Loaded(layout, [name for name in own if name in renamed], sorted(skipped), missing)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name."""
    state: Any
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path}: needs the package safetensors: pip install 'pspnet_fast[safetensors]'") from None
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: is damaged or no file of safetensors ({error})") from None
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the reader trips over
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"holds Python objects ({found[1]})" if found else "is damaged"
            raise ValueError(f"{path}: {what}; expected weights that torch.load reads with weights_only=True") from None
        while isinstance(state, Mapping) and (inner := next((key for key in _CONTAINERS if key in state), None)):
            state = state[inner]
    tensors = isinstance(state, Mapping) and {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no weights; expected a state_dict, alone or as the entry state_dict or model")
    return tensors


def _strip(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The names from ``layer1`` on without what stands before them in all of a backbone's."""
    prefix = ""
    while not any(name.startswith(f"{prefix}layer1.") for name in weights):
        longer = next((prefix + more for more in _PREFIXES if any(n.startswith(prefix + more) for n in weights)), None)
        if longer is None:
            first = ", ".join(list(weights)[:3])
            raise ValueError(f"{path}: no layer1 to layer4 of a ResNet among its {len(weights)} entries ({first}, ...)")
        prefix = longer
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _recognise(weights: Mapping[str, Tensor], path: Path) -> tuple[str, dict[str, str]]:
    """Whose names these are, and the stem's layers by their index in layer0."""
    if "layer0.0.weight" in weights:
        return "PSPNet", {f"layer0.{index}": str(index) for index in (0, 1, 3, 4, 6, 7)}
    for layout, stem in _DEEP.items():
        if all(f"{name}.weight" in weights for name in stem):
            return layout, stem
    if "conv1.weight" in weights and "bn1.weight" in weights:
        return "torchvision or timm", _CONV7
    known = "conv1 (one or three convolutions), stem or layer0"
    raise ValueError(f"{path}: its stem is none that is known: expected {known} before layer1")


def _rename(weights: Mapping[str, Tensor], stem: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    renamed, skipped = {}, []
    for name, value in weights.items():
        layer, _, tensor = name.rpartition(".")
        if layer in stem:
            renamed[f"layer0.{stem[layer]}.{tensor}"] = value
        elif _LAYER.fullmatch(name):
            renamed[name] = value
        else:
            skipped.append(name)
    return renamed, skipped


def _check(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], layout: str, path: Path) -> None:
    """Raise ValueError unless every weight of the backbone is there, and no other."""
    widths = _widths(weights)
    stems = {known: name for name, known in STEMS.items()}
    stem, mine = stems.get(widths), stems.get(_widths(own))
    what = f"{path} ({layout} layout)"
    if any(".downsample.2." in name for name in weights):
        raise ValueError(
            f"{what}: pools in its shortcuts (downsample.0 has no weight), as ResNet-D and mmsegmentation's V1d do, "
            "which this ResNet does not have; choose weights of a ResNet without, such as timm's resnet50s"
        )
    if stem != mine:
        choose = f"choose model.stem={stem}" if stem else f"there is no such stem here, only {', '.join(STEMS)}"
        raise ValueError(f"{what}: its stem has {_words(widths)}, the model's is {mine}; {choose}")
    different = [
        name
        for name, value in own.items()
        if (name in weights and weights[name].shape != value.shape)
        or (name not in weights and not name.endswith("num_batches_tracked"))
    ]
    different += [name for name in weights if name not in own]
    if different:
        name = different[0]
        shapes = [tuple(state[name].shape) if name in state else "missing" for state in (weights, own)]
        raise ValueError(
            f"{what}: is {_backbone(weights)}, the model's backbone is {_backbone(own)}; choose model.backbone "
            f"accordingly ({name}: {shapes[0]} in the file, {shapes[1]} in the model)"
        )


def _widths(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Channels of the stem's convolutions."""
    names = [f"layer0.{index}.weight" for index in (0, 3, 6)]
    return tuple(weights[name].size(0) for name in names if name in weights)


def _words(widths: tuple[int, ...]) -> str:
    if len(widths) == 1:
        return f"one convolution of {widths[0]} channels"
    return f"{len(widths)} convolutions of {', '.join(map(str, widths))} channels"


def _backbone(weights: Mapping[str, Tensor]) -> str:
    """What a ResNet's weights are, by its blocks."""
    blocks = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"{layer}.")}) for layer in LAYERS[1:]
    )
    block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
    known = next((name for name, (kind, counts) in BACKBONES.items() if (kind, counts) == (block, blocks)), None)
    return known or f"a ResNet of {blocks} blocks"
