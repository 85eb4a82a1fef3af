"""The names of a ResNet's weights in other packages, and what a ResNet is by the shapes of its weights."""

import re
from collections.abc import Mapping

from torch import Tensor

from pspnet_fast.models.resnet import BACKBONES, STEMS, BasicBlock, Bottleneck

LAYERS = ("layer0", "layer1", "layer2", "layer3", "layer4")
PREFIXES = ("_orig_mod.", "module.", "backbone.", "encoder.", "pretrained.", "model.")
# The stem's layers as others name them -> index in layer0. Of one 7x7 convolution and of three 3x3 ones.
_CONV7 = {"conv1": "0", "bn1": "1"}
_DEEP = {
    "semseg": {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "conv3": "6", "bn3": "7"},
    "timm": {"conv1.0": "0", "conv1.1": "1", "conv1.3": "3", "conv1.4": "4", "conv1.6": "6", "bn1": "7"},
    "mmsegmentation": {f"stem.{index}": str(index) for index in (0, 1, 3, 4, 6, 7)},
}
_LAYER = re.compile(r"(layer[1-4]\.\d+\.(conv|bn)[123]|layer[1-4]\.\d+\.downsample\.[012])\.(\w+)")


def strip_prefixes(weights: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """The names from ``layer1`` on without what stands before them in all of a backbone's.

    Raises:
        ValueError: there is no ``layer1``.
    """
    prefix = ""
    while not any(name.startswith(f"{prefix}layer1.") for name in weights):
        longer = next((prefix + more for more in PREFIXES if any(n.startswith(prefix + more) for n in weights)), None)
        if longer is None:
            first = ", ".join(list(weights)[:3])
            raise ValueError(f"{path}: no layer1 to layer4 of a ResNet among its {len(weights)} entries ({first}, ...)")
        prefix = longer
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def recognise_stem(weights: Mapping[str, Tensor], path: object) -> tuple[str, dict[str, str]]:
    """Whose names these are, and the stem's layers by their index in layer0.

    Raises:
        ValueError: nobody's that are known.
    """
    if "layer0.0.weight" in weights:
        return "PSPNet", {f"layer0.{index}": str(index) for index in (0, 1, 3, 4, 6, 7)}
    for layout, stem in _DEEP.items():
        if all(f"{name}.weight" in weights for name in stem):
            return layout, stem
    if "conv1.weight" in weights and "bn1.weight" in weights:
        return "torchvision or timm", _CONV7
    known = "conv1 (one or three convolutions), stem or layer0"
    raise ValueError(f"{path}: its stem is none that is known: expected {known} before layer1")


def own_name(name: str, stem: Mapping[str, str]) -> str | None:
    """The name in ``layer0`` .. ``layer4`` of a stripped entry; None if it is none of a backbone."""
    layer, _, tensor = name.rpartition(".")
    if layer in stem:
        return f"layer0.{stem[layer]}.{tensor}"
    return name if _LAYER.fullmatch(name) else None


def stem_widths(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Channels of the stem's convolutions."""
    names = [f"layer0.{index}.weight" for index in (0, 3, 6)]
    return tuple(weights[name].size(0) for name in names if name in weights)


def stem_text(widths: tuple[int, ...]) -> str:
    if len(widths) == 1:
        return f"one convolution of {widths[0]} channels"
    return f"{len(widths)} convolutions of {', '.join(map(str, widths))} channels"


def stem_of(weights: Mapping[str, Tensor]) -> str | None:
    """The stem's name in STEMS; None if it is none of these."""
    return {known: name for name, known in STEMS.items()}.get(stem_widths(weights))


def pools_in_shortcuts(weights: Mapping[str, Tensor]) -> bool:
    """Whether shortcuts are those of ``avg_down``: a pooling, which has no weight, before convolution and norm."""
    return any(".downsample.2." in name for name in weights)


def backbone_of(weights: Mapping[str, Tensor]) -> str:
    """What a ResNet's weights are, by its blocks: a name in BACKBONES, or words."""
    blocks = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"{layer}.")}) for layer in LAYERS[1:]
    )
    block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
    known = next((name for name, (kind, counts) in BACKBONES.items() if (kind, counts) == (block, blocks)), None)
    return known or f"a ResNet of {blocks} blocks"
