"""export: a model as a file for the runtime that it is deployed in, checked against PyTorch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pspnet_fast.files import replacing_beside

from .formats import WRITERS
from .graph import graph_of
from .wrapper import Deployed

Format = Literal["onnx", "torch-export", "aoti", "openvino", "coreml"]
FORMATS: tuple[Format, ...] = get_args(Format)
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2", "openvino": ".xml", "coreml": ".mlpackage"}
KERNELS = ("torch-export", "aoti")  # whose programs may call operators of ours


@dataclass(frozen=True)
class ExportReport:
    """What export wrote.

    Attributes:
        path: the file.
        format: of it.
        difference: from PyTorch on the example, the greatest of all outputs, as a share of the greatest of PyTorch's;
            of class maps the share of pixels whose class is another. None where nothing here can run it.
    """

    path: Path
    format: Format
    difference: float | None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.path}: not checked, since nothing here runs it"
        return f"{self.path}: differs from PyTorch by {self.difference:.1e} on the example"


def export(
    model: nn.Module,
    example: Tensor,
    *,
    path: str | os.PathLike[str],
    format: Format = "onnx",
    dynamic: bool = False,
    argmax: bool = False,
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
    portable: bool = False,
    winograd: bool = False,
) -> ExportReport:
    """Writes a model in evaluation as a file of a runtime, and runs that on the example, where it is installed.

    The heads run without their concatenation in it, those of FusedPSPHead, FusedUpsampleConcat and PSPNet as well as of
    models after :func:`pspnet_fast.fuse`: as convolutions and products with matrices, which are constants for one size
    and computed of the image's size with `dynamic`. Batch norms are folded into convolutions.

    Args:
        model: takes an image (N, 3, H, W) and returns logits (N, K, h, w), alone, as {"out": logits} or as `.logits`.
        example: an image, of the size that is meant where `dynamic` is not set; of what `normalise` asks for.
        path: of the file; its ending is the format's: .onnx, .pt2, .xml (beside it .bin) or .mlpackage. It is
            replaced once the new one is whole and has run.
        format: "onnx" (needs onnx and onnxscript), "openvino" (and openvino), "coreml" (coremltools), "torch-export" or
            "aoti", compiled ahead of time for this machine. The last two call the kernels of this package.
        dynamic: whether batch, height and width may be any. A model after fuse then upsamples and concatenates as it
            did before: right, but without gain.
        argmax: whether the program returns the class of every pixel, (N, H, W) uint8, int32 from 257 classes on. It
            returns logits else: PSPNet's at the image's size, (N, K, H, W), others as the model does.
        normalise: (mean, std) of each channel for images in 0..1. The program then takes what decoders give, (N, H, W,
            3) uint8, and else normalised (N, 3, H, W).
        portable: whether "torch-export" and "aoti" do without the kernels, as all other formats do.
        winograd: whether 3x3 convolutions of 512 and more channels, on maps of 1024 pixels and more, become products
            with matrices by Winograd's F(3x3, 3x3), with 25/81 of the multiplications, and 25/9 of the weights in the
            file. For a fixed size in float32 on CPUs, where it takes a fifth less time (docs/export.md); not where
            the runtime computes in bfloat16, float16 or eight bits, in which it loses too much. Without kernels.

    Returns:
        What was written, and how far it is from PyTorch.

    Raises:
        ValueError: an argument is none of those allowed; the model returns no logits.
        ModuleNotFoundError: what the format needs is not installed.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, but is {format!r}")
    if path.suffix != ENDINGS[format]:
        raise ValueError(f"path must end in {ENDINGS[format]} for format {format!r}, but is {str(path)!r}")
    if not isinstance(example, Tensor) or example.dim() != 4:
        raise ValueError("example must be a tensor of an image, of shape (N, 3, H, W) or with normalise (N, H, W, 3)")
    if normalise is not None and (example.dtype != torch.uint8 or example.size(3) != 3):
        raise ValueError(
            f"example must be (N, H, W, 3) uint8 with normalise, but is {tuple(example.shape)} {example.dtype}"
        )
    if winograd and dynamic:
        raise ValueError("winograd must be False with dynamic: its matrices are of one size")
    if winograd and format in KERNELS and not portable:
        raise ValueError(f"winograd must be False for format {format!r} unless portable is True")
    any_size = dynamic and format in ("onnx", "openvino")
    deployed = Deployed(model, argmax, normalise)
    modes = [(module, module.training) for module in deployed.modules()]
    deployed.eval()
    try:
        with torch.no_grad():
            expected = deployed(example)
        deployed.any_size = any_size
        several = dynamic and example.size(0) == 1  # torch.export takes a size of 1 for fixed
        traced = example.repeat(2, 1, 1, 1) if several else example
        shapes = ({axis: torch.export.Dim.DYNAMIC for axis in _free(example)},) if dynamic else None
        kinds = {"portable": portable or format not in KERNELS, "winograd": winograd, "any_size": any_size}
        program = graph_of(deployed, (traced,), shapes, **kinds)
    finally:
        for module, training in modes:
            module.training = training
    with replacing_beside(path) as new, torch.no_grad():
        run = WRITERS[format](program, new, dynamic)
        difference = None if run is None else difference_of(run(example), expected)
    return ExportReport(path, format, difference)


def _free(example: Tensor) -> tuple[int, ...]:
    """The axes of batch, height and width."""
    return (0, 1, 2) if example.dtype == torch.uint8 else (0, 2, 3)


def difference_of(found: Tensor, expected: Tensor) -> float:
    """The share of class maps that differs; of logits the greatest difference as a share of the greatest."""
    if found.shape != expected.shape:
        raise RuntimeError(
            f"the exported program gives {tuple(found.shape)} where PyTorch gives {tuple(expected.shape)}"
        )
    if not expected.is_floating_point():
        return (found != expected).float().mean().item()
    return ((found - expected).abs().max() / expected.abs().max()).item()
