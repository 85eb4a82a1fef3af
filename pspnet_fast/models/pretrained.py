"""Backbone weights that others trained, recognised by their keys and shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from pspnet_fast.convert.backbone import (
    LAYERS,
    backbone_of,
    own_name,
    pools_in_shortcuts,
    recognise_stem,
    stem_of,
    stem_text,
    stem_widths,
    strip_prefixes,
)
from pspnet_fast.convert.weights import read_weights
from pspnet_fast.models.resnet import STEMS


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

    Knows the names of torchvision and timm (``resnet18`` .. ``resnet152``, timm's deep stems ``resnet50s``,
    ``resnet50c`` and ``resnet50d``), of semseg's ``resnet50_v2.pth`` and of mmsegmentation's, and a PSPNet's own; in a
    checkpoint the entry ``state_dict`` or ``model``, with prefixes such as ``module.`` or ``backbone.``.

    Args:
        model: a :class:`PSPNet` or :func:`resnet` of this package.
        file: ``.safetensors`` (needs the package safetensors), ``.npz``, else a file of torch.save, read with
            weights_only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no such weights, or those of another backbone or stem; the message names the one to choose.
            The model is as it was then.
    """
    path = Path(file)
    weights = strip_prefixes(read_weights(path).tensors, path)
    layout, stem = recognise_stem(weights, path)
    names = {name: own_name(name, stem) for name in weights}
    renamed = {own: weights[name] for name, own in names.items() if own}
    skipped = [name for name, own in names.items() if not own]
    own = {name: value for name, value in model.state_dict().items() if name.partition(".")[0] in LAYERS}
    _check(renamed, own, layout, path)
    missing = [name for name in own if name not in renamed]
    for name, value in renamed.items():
        own[name].copy_(value)
    return Loaded(layout, [name for name in own if name in renamed], sorted(skipped), missing)


def _check(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], layout: str, path: Path) -> None:
    """Raise ValueError unless every weight of the backbone is there, and no other."""
    stem, mine = stem_of(weights), stem_of(own)
    what = f"{path} ({layout} layout)"
    if (pools := pools_in_shortcuts(weights)) != pools_in_shortcuts(own):
        does = "pools in its shortcuts, as ResNet-D does" if pools else "does not pool in its shortcuts"
        raise ValueError(
            f"{what}: {does}, the model {'does not' if pools else 'does'}; choose model.avg_down={str(pools).lower()}"
        )
    if stem != mine:
        choose = f"choose model.stem={stem}" if stem else f"there is no such stem here, only {', '.join(STEMS)}"
        raise ValueError(f"{what}: its stem has {stem_text(stem_widths(weights))}, the model's is {mine}; {choose}")
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
            f"{what}: is {backbone_of(weights)}, the model's backbone is {backbone_of(own)}; choose model.backbone "
            f"accordingly ({name}: {shapes[0]} in the file, {shapes[1]} in the model)"
        )
