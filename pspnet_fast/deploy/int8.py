"""Eight-bit convolutions by ONNX Runtime's quantiser, and what of the classes changes by them."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pspnet_fast.files import replacing_beside

from .formats import onnx_runner, openvino_runner, write_openvino_of

if TYPE_CHECKING:
    from pspnet_fast.inference.predict import Predictor

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
HELD_OUT = 4  # every fourth image measures, the others calibrate


@dataclass(frozen=True)
class QuantisationReport:
    """What eight bits change.

    Attributes:
        agreement: share of pixels whose class stays the same.
        miou: mean over classes of intersection / union of both class maps, the float one taken for the truth.
        calibrated, measured: by how many images.
    """

    agreement: float
    miou: float
    calibrated: int
    measured: int

    def __str__(self) -> str:
        return (
            f"int8, calibrated on {self.calibrated} images: on {self.measured} others {self.agreement:.2%} of the "
            f"pixels keep their class, mIoU against the classes in float32 {self.miou:.2%}"
        )


def images_of(folder: Path) -> list[Path]:
    """The images of a folder, to any depth.

    Raises:
        ValueError: no folder, or fewer than 4 images.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if len(found) < HELD_OUT:
        raise ValueError(f"--int8 must be a folder with at least {HELD_OUT} images, but {folder} has {len(found)}")
    return found


def quantise(
    predictor: "Predictor",
    path: Path,
    format: str,
    images: Sequence[Path],
    size: tuple[int, int],
    settings: Mapping[str, Any],
) -> QuantisationReport:
    """Replaces an exported file by one with eight-bit convolutions, calibrated on images.

    Args:
        predictor: whose model the file is of.
        format: "onnx" or "openvino".
        images: files; resized to `size` (height, width).
        settings: dynamic, argmax and normalise, as export took them.
    """
    import onnxruntime.quantization as quantization

    from . import export

    inputs = [_input(image, predictor, size, settings["normalise"] is not None) for image in images]
    held_out = inputs[HELD_OUT - 1 :: HELD_OUT]
    calibrating = [image for i, image in enumerate(inputs) if i % HELD_OUT != HELD_OUT - 1]
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "quantised"))
        export(predictor.model, calibrating[0], path=plain, **settings)
        quantization.shape_inference.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            quantised,
            _Reader(calibrating),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],  # where the time is; the products with matrices of sizes stay exact
            nodes_to_exclude=_of_sizes(prepared),
            per_channel=True,
        )
        before = onnx_runner(plain)
        with replacing_beside(path) as new:
            if format == "onnx":
                shutil.copyfile(quantised, new)
                after = onnx_runner(new)
            else:
                write_openvino_of(quantised, new)
                after = openvino_runner(new)
            pairs = [(_classes(before(image)), _classes(after(image))) for image in held_out]
    return _report(pairs, len(predictor.class_names), len(calibrating))


def _of_sizes(path: Path) -> list[str]:
    """The convolutions of what depends on the image's size alone, and is exact: the matrices of any_size.py."""
    import onnx

    graph = onnx.load(path).graph
    pixels = {graph.input[0].name}
    for node in graph.node:
        if node.op_type != "Shape" and not pixels.isdisjoint(node.input):
            pixels.update(node.output)
    return [node.name for node in graph.node if node.op_type == "Conv" and node.input[0] not in pixels]


class _Reader:
    """What the quantiser asks for images."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self._images: Iterator[Tensor] = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {"image": image.numpy()}

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> dict[str, Any]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found


def _input(path: Path, predictor: "Predictor", size: tuple[int, int], raw: bool) -> Tensor:
    """An image as the exported program takes it."""
    import cv2

    from pspnet_fast.data.images import read_image

    pixels = cv2.resize(read_image(path), (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    image = torch.from_numpy(pixels).to(torch.uint8)[None]
    if raw:
        return image
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (predictor.mean, predictor.std))
    return (image.permute(0, 3, 1, 2) / 255 - mean) / std


def _classes(output: Tensor) -> Tensor:
    return output.argmax(1) if output.is_floating_point() else output.long()


def _report(pairs: Sequence[tuple[Tensor, Tensor]], classes: int, calibrated: int) -> QuantisationReport:
    from pspnet_fast import ops

    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for before, after in pairs:
        ops.confusion_matrix(after, before, classes, ignore_index=-1, out=counts)
    same, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    miou = (same[union > 0] / union[union > 0]).mean().item()
    return QuantisationReport((same.sum() / counts.sum()).item(), miou, calibrated, len(pairs))
