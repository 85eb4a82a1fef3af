"""fuse: other people's models on the fused operators, in place and with their own modules and parameters."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from torch import Tensor, nn

from .patch import Fused, apply, remove
from .search import LowResolution, candidates, trial

Model = TypeVar("Model", bound=nn.Module)
Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

logger = logging.getLogger("pspnet_fast")


@dataclass(frozen=True)
class FuseReport:
    """What fuse did.

    Attributes:
        fused: names of the modules in whose forward upsampling is put off.
        chosen_for: names of the modules that upsample, pyramids for example, for which they were chosen; empty where
            they were named or found by an example.
        convolutions: what the forward on the example convolved at low resolution; empty without an example.
    """

    fused: tuple[str, ...]
    chosen_for: tuple[str, ...] = ()
    convolutions: tuple[LowResolution, ...] = ()

    def __str__(self) -> str:
        lines = [f"fused {name!r}" for name in self.fused]
        lines += [f"chosen for {name!r}" for name in self.chosen_for if name not in self.fused]
        return "\n".join([*lines, *map(str, self.convolutions)])


@overload
def fuse(
    model: Model,
    *,
    modules: Iterable[str] | None = None,
    example: Example | None = None,
    return_report: Literal[False] = False,
) -> Model: ...


@overload
def fuse(
    model: Model,
    *,
    modules: Iterable[str] | None = None,
    example: Example | None = None,
    return_report: Literal[True],
) -> tuple[Model, FuseReport]: ...


def fuse(
    model: Model,
    *,
    modules: Iterable[str] | None = None,
    example: Example | None = None,
    return_report: bool = False,
) -> Any:
    """Convolves the upsampled maps of a model before their upsampling, not after it, in place.

    The model's own modules run as ever, hooks, subclasses and exchanged layers included. But in the forward of a fused
    module F.interpolate (bilinear or nearest) gives a map that is not computed yet, and so does torch.cat along
    channels of such; a convolution takes the maps as they were before, as FusedPSPHead does, exactly; and whatever else
    touches such a map computes it first, as the model alone would have. Where F.linear gives the upsampled map and a
    1x1 convolution takes it (SegFormer), both run as one linear map. In inference, batch norm and ReLU run in the same
    pass. A map that is pooled to the sizes of several layers nn.AdaptiveAvgPool2d is read once. So any head will do,
    however it is written. Tested are segmentation_models_pytorch's PSPNet, UPerNet, Segformer, DeepLabV3, DeepLabV3+,
    FPN, Unet (both ways of upsampling) and Unet++ and transformers' UperNet, SegFormer, BEiT, Data2Vec and DPT
    themselves (FPN and DPT are found by an example only), and heads of the structure of semseg's pyramid,
    mmsegmentation's PSPHead, UPerHead, SegformerHead, FCNHead on HRNet and SETRUPHead, HRNet-OCR, ICNet, DeepLabV3+
    with a dense convolution, and milesial's U-Net. Not: upsampling otherwise (bicubic, or nearest by a scale that
    rounding decides), transposed and depthwise convolutions (FastSCNN's feature fusion), and maps that are added
    or go through an activation between upsampling and convolution (MAnet, PAN, LinkNet).

    Parameters, state_dict, optimizers, copies, pickles and checkpointing go on as before. torch.export (strict=False)
    sees what runs. Under torch.compile, torch.jit and the transforms of torch.func the model's own forward runs,
    without gain. torch.fx traces what calls fused modules; to trace one itself whose forward has `*args`, `**kwargs` or
    keyword-only arguments, unfuse it first.

    Args:
        model: any module.
        modules: names in model.named_modules(), whose forwards are fused; "" is the model. By default, for each module
            that looks like a pyramid (layers nn.AdaptiveAvgPool2d of several sizes, or calls of adaptive_avg_pool2d and
            interpolate in its code), the one whose forward calls it, and each that interpolates, concatenates and has
            convolutions.
        example: arguments of a forward (a tensor, a tuple, or a dictionary by names) to run once, in evaluation and
            without gradients. Without `modules`, what is fused is what this shows to gain by it.
        return_report: whether to return (model, FuseReport). The logger "pspnet_fast" says the same.

    Returns:
        model, or (model, report).

    Raises:
        TypeError: modules is a string.
        ValueError: nothing to fuse, or a name that the model has not; the model is unchanged.
    """
    found: tuple[LowResolution, ...] = ()
    beneath: tuple[str, ...] = ()
    if modules is not None:
        if isinstance(modules, str):
            raise TypeError(f"modules must be several names, such as [{modules!r}], but is {modules!r}")
        names = tuple(dict.fromkeys(modules))
        known = dict(model.named_modules())
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"modules must be names in model.named_modules(), which has no {missing}")
    if example is not None:
        found = tuple(trial(model, example))
    if modules is None and example is not None:
        names = tuple(dict.fromkeys(convolution.scope for convolution in found))
        if not names:
            raise ValueError("nothing to fuse: the forward on the example convolves no upsampled map at a gain")
    elif modules is None:
        owners = candidates(model)
        beneath, names = tuple(owners), tuple(dict.fromkeys(owners.values()))
        if not names:
            raise ValueError(
                "nothing to fuse: no module of the model has layers nn.AdaptiveAvgPool2d of several sizes, calls "
                "adaptive_avg_pool2d and interpolate, or interpolates and concatenates; give an example, or name the "
                "module that concatenates and convolves in `modules`"
            )
    for name in names:
        apply(model.get_submodule(name))
    report = FuseReport(names, beneath, found)
    logger.info("%s", report)
    return (model, report) if return_report else model


def unfuse(model: Model) -> Model:
    """Undoes fuse, in place: every module has its own class and forward again. A model without fused ones stays."""
    for module in list(model.modules()):
        remove(module)
    return model


__all__ = ["FuseReport", "Fused", "LowResolution", "fuse", "unfuse"]
