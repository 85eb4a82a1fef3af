"""fuse: other people's models on the fused operators, in place and with their own parameters."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, overload

from torch import nn
from torch.random import fork_rng

from ..ops.checks import Bins
from .patch import Fused, apply, remove
from .structure import (
    Chain,
    NotFusable,
    Output,
    Structure,
    candidates,
    check_hooks,
    parse,
    parse_bottleneck,
    resolve,
)

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("pspnet_fast")


@dataclass(frozen=True)
class PyramidSettings:
    """What a named module computes, for what fuse cannot find out itself; None: to be found out.

    With align_corners, concat and output all given, the module is believed and not tried.

    Args:
        align_corners: of the bilinear upsampling.
        concat: "input_first" for [x, levels], "input_last" for [levels, x].
        bins: sizes of the levels, where the module does not pool by nn.AdaptiveAvgPool2d.
        output: "concat" for the concatenation, "maps" for the list of upsampled levels, "head" for what the module's
            own bottleneck makes of the concatenation.
    """

    align_corners: bool | None = None
    concat: Literal["input_first", "input_last"] | None = None
    bins: Bins | None = None
    output: Output | None = None


@dataclass(frozen=True)
class Replaced:
    """A pyramid that was fused: its module, the module of the bottleneck fused with it, and its conventions."""

    pyramid: str
    bottleneck: str | None
    bins: Bins
    align_corners: bool
    concat: str
    note: str = ""

    def __str__(self) -> str:
        conventions = f"bins {self.bins}, align_corners={self.align_corners}, {self.concat}"
        head = f" with {self.bottleneck!r}" if self.bottleneck is not None else ", without a bottleneck"
        return f"fused {self.pyramid!r}{head}: {conventions}{'; ' if self.note else ''}{self.note}"


@dataclass(frozen=True)
class Kept:
    """A module that looked like a pyramid and stays as it is, and why."""

    module: str
    reason: str

    def __str__(self) -> str:
        return f"kept {self.module!r}: {self.reason}"


@dataclass(frozen=True)
class FuseReport:
    """What fuse replaced, and what it did not and why."""

    replaced: tuple[Replaced, ...]
    kept: tuple[Kept, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.replaced, *self.kept)))


@dataclass(frozen=True)
class _Plan:
    name: str
    structure: Structure
    bottleneck: tuple[str, Chain] | None = None
    note: str = ""


@overload
def fuse(
    model: Model,
    *,
    modules: Iterable[str] | Mapping[str, PyramidSettings] | None = None,
    heads: bool = True,
    return_report: Literal[False] = False,
) -> Model: ...


@overload
def fuse(
    model: Model,
    *,
    modules: Iterable[str] | Mapping[str, PyramidSettings] | None = None,
    heads: bool = True,
    return_report: Literal[True],
) -> tuple[Model, FuseReport]: ...


def fuse(
    model: Model,
    *,
    modules: Iterable[str] | Mapping[str, PyramidSettings] | None = None,
    heads: bool = True,
    return_report: bool = False,
) -> Any:
    """Puts the pyramid pooling of a model, and the bottleneck behind it, on the fused operators, in place.

    Found by structure, whatever the classes are called: modules that pool adaptively to several sizes, each followed
    by a 1x1 convolution, norm and activation, and return the concatenation (semseg's PPM, the PSPModule of
    segmentation_models_pytorch), the list of upsampled levels (psp_modules of mmsegmentation and transformers), or what
    a bottleneck of their own makes of the concatenation. align_corners and the order are found by running a copy with
    random weights on a small map and comparing: what computes anything else stays as it is. The bottleneck is the one
    module beside the pyramid that begins with an odd convolution of stride 1 and as many channels as the concatenation.

    The parameters stay the very same: optimizers made before keep working, and state_dict has the same keys and values.
    Fuse before torch.compile, and unfuse before an export to another runtime. Changes of align_corners in the model
    afterwards have no effect. At batch 1, a level of one cell in training takes its running statistics (see FusedPPM).

    Args:
        model: any module.
        modules: names of the pyramids in model.named_modules(), all others being left alone; or a mapping from such
            names to PyramidSettings.
        heads: whether to fuse bottlenecks with their pyramids; else pyramids alone, which is also what to do where
            something else than the bottleneck uses the concatenation (the forward raises then).
        return_report: whether to return (model, FuseReport). The logger "pspnet_fast" says the same.

    Returns:
        model, or (model, report).

    Raises:
        ValueError: nothing to fuse, or a named module that does not exist or cannot be fused; the message says why, and
            the model is unchanged.
    """
    settings: dict[str, PyramidSettings]
    if modules is None:
        settings = {name: PyramidSettings() for name in candidates(model)}
    else:
        if isinstance(modules, str):
            raise TypeError(f"modules must be several names or a mapping, such as [{modules!r}], but is {modules!r}")
        settings = dict(modules) if isinstance(modules, Mapping) else dict.fromkeys(modules, PyramidSettings())
        named = dict(model.named_modules())
        if missing := [name for name in settings if name not in named]:
            raise ValueError(f"modules must be names in model.named_modules(), which has no {missing}")
    plans, kept = [], []
    with fork_rng(devices=[]):
        for name, given in settings.items():
            try:
                plans.append(_plan(model, name, given, heads))
            except NotFusable as reason:
                kept.append(Kept(name, str(reason)))
    report = FuseReport(tuple(map(_replaced, plans)), tuple(kept))
    if not plans or (modules is not None and kept):
        looked_for = (
            "nothing to fuse: looked for modules of AdaptiveAvgPool2d to several sizes, each with a 1x1 Conv2d, norm "
            "and activation, that concatenate them with their input"
        )
        raise ValueError("\n".join([looked_for, *map(str, kept)]))
    for plan in plans:
        apply(model, plan.name, plan.structure, plan.bottleneck)
    for line in (*report.replaced, *report.kept):
        logger.info("%s", line)
    return (model, report) if return_report else model


def unfuse(model: Model) -> Model:
    """Undoes fuse, in place: every module has its own class and forward again. A model without fused ones stays."""
    for module in list(model.modules()):
        if isinstance(module, Fused):
            remove(module)
    return model


def _plan(model: nn.Module, name: str, given: PyramidSettings, heads: bool) -> _Plan:
    """How to fuse one pyramid; raises NotFusable."""
    module = model.get_submodule(name)
    if isinstance(module, Fused):
        raise NotFusable("it is fused already")
    structure = parse(module, given.bins)
    structure = replace(structure, align_corners=given.align_corners, concat=given.concat, output=given.output)
    structure = resolve(module, structure)
    if structure.output == "head":
        if not heads:
            raise NotFusable("its bottleneck is part of it, and heads=False")
        return _Plan(name, structure)
    bottleneck, note = None, ""
    if heads:
        try:
            bottleneck = _find_bottleneck(model, name, structure)
        except NotFusable as reason:
            note = str(reason)
    if bottleneck is None and structure.output == "maps":
        raise NotFusable(note or "it gives a list of maps, which only a bottleneck can be fused with, and heads=False")
    return _Plan(name, structure, bottleneck, note)


def _find_bottleneck(model: nn.Module, name: str, structure: Structure) -> tuple[str, Chain]:
    """Name and layers of the one module beside a pyramid that takes its concatenation; raises NotFusable."""
    owner_name, _, own = name.rpartition(".")
    pyramid = model.get_submodule(name)
    if not name:
        raise NotFusable("the pyramid is the whole model: no bottleneck beside it")
    check_hooks([pyramid])
    ppm = structure.ppm(pyramid)
    channels = ppm.out_channels
    found, reasons = [], []
    for part, module in model.get_submodule(owner_name)._modules.items():
        if part == own or module is None or isinstance(module, Fused) or not _takes(module, channels):
            continue
        full = f"{owner_name}.{part}" if owner_name else part
        try:
            found.append((full, parse_bottleneck(module, ppm)))
        except NotFusable as reason:
            reasons.append(f"{full}: {reason}")
    if len(found) != 1:
        several = f"{len(found)} modules beside it take its {channels} channels"
        raise NotFusable("; ".join([several if found else f"no bottleneck of {channels} channels beside it", *reasons]))
    return found[0]


def _takes(module: nn.Module, channels: int) -> bool:
    """Whether the first convolution of a module has these channels."""
    convolutions = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    first = next(convolutions, None)
    return first is not None and first.in_channels == channels and type(module).forward is not nn.Module.forward


def _replaced(plan: _Plan) -> Replaced:
    structure = plan.structure
    beside = plan.bottleneck[0] if plan.bottleneck else plan.name if structure.output == "head" else None
    concat = str(structure.concat)
    return Replaced(plan.name, beside, structure.bins, bool(structure.align_corners), concat, plan.note)


__all__ = ["FuseReport", "Kept", "PyramidSettings", "Replaced", "fuse", "unfuse"]
