"""Arguments of PSPNet that the shapes of its weights tell, and what conversion does to their values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pspnet_fast.convert.backbone import backbone_of, pools_in_shortcuts, stem_of, stem_text, stem_widths
from pspnet_fast.models.resnet import BACKBONES, STAGES, STEMS

BINS = [1, 2, 3, 6]
CLASSIFIERS = ("cls.4", "aux.4")


def has_head(weights: Mapping[str, Tensor]) -> bool:
    """Whether there is a pyramid or its classifier: more than a backbone and an auxiliary head."""
    return any(name.startswith(("ppm.", "cls.")) for name in weights)


def describe(weights: Mapping[str, Tensor], path: object) -> dict[str, Any]:
    """Arguments of PSPNet, as plain data, by the shapes of weights under its names.

    Raises:
        ValueError: they are those of no PSPNet that this package can build.
    """
    backbone = backbone_of(weights)
    stem = stem_of(weights)
    if backbone not in BACKBONES:
        raise ValueError(f"{path}: is {backbone}; known are {', '.join(BACKBONES)}")
    if stem is None:
        raise ValueError(f"{path}: its stem has {stem_text(stem_widths(weights))}; known are {', '.join(STEMS)}")
    arguments: dict[str, Any] = {"backbone": backbone, "stem": stem, "avg_down": pools_in_shortcuts(weights)}
    if not has_head(weights):
        return arguments
    for name in ("ppm.features.0.1.weight", "cls.0.weight", "cls.4.weight"):
        if name not in weights or weights[name].dim() != 4:
            raise ValueError(f"{path}: its head lacks {name} (as a PSPNet here calls it)")
    level, bottleneck, classifier = (weights[f"{name}.weight"] for name in ("ppm.features.0.1", "cls.0", "cls.4"))
    widths = [64 * BACKBONES[backbone][0].expansion * 2**stage for stage in range(4)]
    channels = level.size(1)
    if channels not in widths or (stages := widths.index(channels) + 1) not in STAGES:
        raise ValueError(f"{path}: its pyramid pools {channels} channels, which no stage of {backbone} has ({widths})")
    return arguments | {
        "stages": stages,
        "reduction_channels": level.size(0),
        "bin1_norm": not ("ppm.features.0.1.bias" in weights and "ppm.features.0.2.weight" not in weights),
        "head_channels": bottleneck.size(0),
        "bottleneck_kernel": bottleneck.size(2),
        "classifier_kernel": classifier.size(2),
        "aux": "aux.0.weight" in weights,
    }


def count_levels(weights: Mapping[str, Tensor]) -> int:
    """Of the pyramid."""
    return len({name.split(".")[2] for name in weights if name.startswith("ppm.features.")})


def count_classes(weights: Mapping[str, Tensor]) -> int | None:
    """Of the classifier, or of the auxiliary one where it stands alone."""
    return next((weights[f"{name}.weight"].size(0) for name in CLASSIFIERS if f"{name}.weight" in weights), None)


def fold_biases(weights: dict[str, Tensor]) -> list[str]:
    """Take the bias of each convolution before a batch norm into its running mean, which gives the same outputs.

    Returns:
        The names of these biases, which are no longer in ``weights``.
    """
    folded = []
    for name in [name for name in weights if name.startswith(("ppm.", "cls.", "aux.")) and name.endswith(".bias")]:
        layer, _, index = name.removesuffix(".bias").rpartition(".")
        mean = f"{layer}.{int(index) + 1}.running_mean"
        if index in "01" and mean in weights and weights[mean].shape == weights[name].shape:
            weights[mean] = (weights[mean].double() - weights.pop(name).double()).to(weights[mean].dtype)
            folded.append(name)
    return folded


def reverse_levels(weights: dict[str, Tensor], levels: int) -> None:
    """Reorder the bottleneck's input channels from [features, last bin .. first] to [features, first .. last].

    Raises:
        ValueError: it has not as many.
    """
    weight = weights["cls.0.weight"]
    channels, features = weights["ppm.features.0.1.weight"].shape[:2]
    if weight.size(1) != features + levels * channels:
        raise ValueError(
            f"the bottleneck has {weight.size(1)} channels, for {features} and {levels} levels of {channels}"
        )
    first, *parts = weight.split([features, *[channels] * levels], 1)
    weights["cls.0.weight"] = torch.cat([first, *parts[::-1]], 1)


def add_background(weights: dict[str, Tensor]) -> None:
    """Make two classes of one output z that is meant for a sigmoid: logits (0, z), whose softmax is 1 - sigmoid(z) and
    sigmoid(z).
    """
    for name in [f"{layer}.{tensor}" for layer in CLASSIFIERS for tensor in ("weight", "bias")]:
        if name in weights:
            weights[name] = torch.cat([torch.zeros_like(weights[name]), weights[name]])


def turn_colors(weights: dict[str, Tensor]) -> None:
    """Make the first convolution, which takes BGR images, take RGB ones."""
    weights["layer0.0.weight"] = weights["layer0.0.weight"].flip(1)
