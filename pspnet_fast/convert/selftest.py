"""A converted model against the package that it comes from, where that is installed."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast.models.pspnet import PSPNet
from pspnet_fast.models.resnet import resnet

TOLERANCE = 1e-4  # of the greatest output; float32 differs by 1e-6 or so
_SIZE = (64, 96)
_PACKAGES = {"smp": "segmentation_models_pytorch", "torchvision": "torchvision", "timm": "timm"}
_Outputs = tuple[Tensor, Tensor]


class NoTest(Exception):
    """Why there is nothing to compare with."""


def self_test(source: str, weights: Mapping[str, Tensor], model: PSPNet, changed: bool) -> str:
    """Compare a model's outputs on a random image with those of the package's own model with the same weights.

    Args:
        source: its name.
        weights: under the package's names.
        model: in evaluation mode.
        changed: whether it was asked to compute something else.

    Returns:
        The greatest difference, or why there was no comparison.

    Raises:
        ValueError: the outputs differ.
    """
    if source not in _PACKAGES:
        return "not possible: no package of this source can be imported beside torch; its tests stand in for it"
    if changed:
        return "not possible: options or classes make another model of it than the package's"
    name = _PACKAGES[source]
    try:
        package = importlib.import_module(name)
    except Exception as error:  # torchvision's operators may not load with another build of torch
        return f"not possible: {name} cannot be imported ({' '.join(str(error).split())[:80]})"
    image = torch.randn(1, 3, *_SIZE, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            ours, theirs = _COMPARISONS[source](package, weights, model, image)
    except NoTest as reason:
        return f"not possible: {reason}"
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"self-test: {name}'s own model gives other outputs (relative difference {difference:.2g})")
    version = getattr(package, "__version__", "")
    return f"{name} {version}, built as assumed, gives the same outputs (relative difference {difference:.1g})"


def _load(theirs: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    try:
        theirs.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise NoTest(f"the package's model does not take the weights ({' '.join(str(error).split())[:120]})") from None
    return theirs.eval()


def _smp(package: Any, weights: Mapping[str, Tensor], model: PSPNet, image: Tensor) -> _Outputs:
    config: Any = model.config
    depth, deepest = config["stages"] + 1, config["stages"] == 4
    outputs = weights["segmentation_head.0.weight"].size(0)
    theirs = package.PSPNet(
        config["backbone"],
        encoder_weights=None,
        encoder_depth=depth,
        psp_out_channels=config["head_channels"],
        classes=outputs,
        **({"output_stride": 8} if deepest else {}),
    )
    if depth == 4:
        raise NoTest("at encoder_depth=4 the package gives logits of another size")
    parts = ("encoder.", "decoder.", "segmentation_head.")
    own = {name: value for name, value in weights.items() if name.startswith(parts) and "encoder.fc." not in name}
    expected = _load(theirs, own)(image)
    logits = model(image)["out"]
    if outputs == 1:  # the background's logit is 0
        logits = logits[:, 1:] - logits[:, :1]
    return F.interpolate(logits, _SIZE, mode="bilinear", align_corners=True), expected


def _torchvision(package: Any, weights: Mapping[str, Tensor], model: PSPNet, image: Tensor) -> _Outputs:
    config: Any = model.config
    if config["stem"] != "conv7" or config["backbone"] in ("resnet18", "resnet34"):
        raise NoTest(f"torchvision has no dilated {config['backbone']} with such a stem")
    theirs = getattr(package.models, config["backbone"])(replace_stride_with_dilation=[False, True, True])
    _load_backbone(theirs, weights)
    return _features(model, image), _run(theirs, ["conv1", "bn1", "relu", "maxpool", *_LAYERS], image)


def _timm(package: Any, weights: Mapping[str, Tensor], model: PSPNet, image: Tensor) -> _Outputs:
    config: Any = model.config
    suffix = {"conv7": "", "deep32": "c", "deep64": "s"}[config["stem"]]
    if config["avg_down"]:
        if config["stem"] != "deep32":
            raise NoTest("this package has no ResNet-D with such a stem under a name that is known")
        suffix = "d"
    # where a stride was taken out timm's ResNet-D pools with stride 1: it is compared as it was trained
    stride = 32 if config["avg_down"] else 8
    theirs = package.create_model(config["backbone"] + suffix, pretrained=False, output_stride=stride)
    _load_backbone(theirs, weights)
    ours: nn.Module = model
    if stride == 32:
        ours = resnet(config["backbone"], stem=config["stem"], avg_down=True, output_stride=32).eval()
        ours.load_state_dict({name: value for name, value in model.state_dict().items() if name.startswith("layer")})
    return _features(ours, image), theirs.forward_features(image)


_LAYERS = ["layer1", "layer2", "layer3", "layer4"]
_COMPARISONS: dict[str, Callable[[Any, Mapping[str, Tensor], PSPNet, Tensor], _Outputs]] = {
    "smp": _smp,
    "torchvision": _torchvision,
    "timm": _timm,
}


def _load_backbone(theirs: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Weights without classifiers, and with or without ``backbone.`` before their names."""
    prefix = "backbone." if any(name.startswith("backbone.") for name in weights) else ""
    own = theirs.state_dict()
    known = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    _load(theirs, {**own, **{name: known[name] for name in own if name in known and not name.startswith("fc.")}})


def _features(model: nn.Module, image: Tensor) -> Tensor:
    return _run(model, ["layer0", *_LAYERS], image)


def _run(model: nn.Module, names: list[str], image: Tensor) -> Tensor:
    for name in names:
        image = getattr(model, name)(image)
    return image
