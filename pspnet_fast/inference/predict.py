"""Label maps of images, of any size."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pspnet_fast import ops
from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.data.images import Image, read_image
from pspnet_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from pspnet_fast.inference.memory import Cost, fit_what_is_free, measure
from pspnet_fast.inference.protocol import Protocol
from pspnet_fast.inference.render import palette
from pspnet_fast.inference.sliding import Segmenter
from pspnet_fast.models import PSPNet
from pspnet_fast.models.folder import as_checkpoint
from pspnet_fast.optimization import optimize

_SMALL = 1 << 21  # pixels that any machine has the memory for
_PROBE = (512, 512)  # size of the image by which the memory for larger ones is estimated


def predict_labels(model: nn.Module, images: Tensor) -> Tensor:
    """Predict the class of every pixel: the greatest logit, bilinearly upsampled to the images' size.

    Args:
        model: in evaluation mode; returns {"out": (N, K, h, w)} and tells ``align_corners``.
        images: (N, 3, H, W), normalised, on the model's device.

    Returns:
        (N, H, W) in 0..K-1, uint8 where K <= 256, else int32.
    """
    height, width = images.shape[-2:]
    return ops.upsample_argmax(model(images)["out"], (height, width), align_corners=bool(model.align_corners))


class Prediction(NamedTuple):
    """What is predicted of an image.

    Attributes:
        labels: (H, W) uint8, the class of every pixel.
        confidence: (H, W) float32, that class's probability; None if not asked for.
        probabilities: (K, H, W) float32, of every class; None if not asked for.
    """

    labels: NDArray[np.uint8]
    confidence: NDArray[np.float32] | None = None
    probabilities: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Predictor:
    """A trained model with all that prediction needs.

    Attributes:
        model: in evaluation mode, on its device.
        class_names, colors: by class index; a colour is (red, green, blue) in 0..255.
        mean, std: per channel, for images in 0..1.
        protocol: how images are predicted, by default whole, at their own size.
        crop: (height, width) of the windows in which the model was trained, where its checkpoint tells.
    """

    model: nn.Module
    class_names: list[str]
    colors: list[tuple[int, int, int]]
    mean: list[float]
    std: list[float]
    protocol: Protocol = field(default_factory=Protocol)
    crop: tuple[int, int] | None = None

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | os.PathLike[str] | Mapping[str, Any], device: str | torch.device = "auto"
    ) -> "Predictor":
        """Build the model from a checkpoint of :func:`pspnet_fast.training.fit` (docs/checkpoints.md has its keys), or
        from a folder of ``PSPNet.save_pretrained`` or ``pspnet-fast convert``.

        Where the checkpoint names no colours, mean or std, it warns and takes generated colours and ImageNet's values.

        Args:
            checkpoint: its file or folder, or what ``load_checkpoint`` read of it.
            device: "auto" is CUDA where there is a GPU, else the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no whole checkpoint, the checkpoint does not describe its model, its weights do not
                fit the description, it has more classes than labels can hold, or there is no such device.
        """
        # The trainer predicts, so its modules import this one.
        from pspnet_fast.training.checkpoint import load_checkpoint
        from pspnet_fast.training.evaluation import choose_device

        device = choose_device(str(device))
        if not isinstance(checkpoint, Mapping):
            path = Path(checkpoint)
            checkpoint = as_checkpoint(path) if path.is_dir() else load_checkpoint(path)
        metadata, class_names = checkpoint["metadata"], list(checkpoint["class_names"])
        if len(class_names) > IGNORE_INDEX:
            raise ValueError(
                f"the checkpoint has {len(class_names)} classes; label maps hold at most {IGNORE_INDEX}, "
                f"since label {IGNORE_INDEX} is ignored"
            )
        if not isinstance(metadata.get("model"), Mapping):
            raise ValueError(
                "the checkpoint does not describe its model: metadata['model'] must be the arguments of PSPNet, which "
                "fit stores for a PSPNet of a named backbone and BatchNorm2d; build any other model yourself and load "
                "the checkpoint's weights, checkpoint['model'], into it"
            )
        try:
            model = PSPNet(len(class_names), **metadata["model"])
            model.load_state_dict(checkpoint["model"])
        except (TypeError, RuntimeError) as error:
            first = " ".join(str(error).split())[:200]
            raise ValueError(f"the checkpoint's weights are not those of the PSPNet it describes ({first})") from None
        if untrained := metadata.get("untrained"):
            warnings.warn(f"the model is not trained: {untrained}", stacklevel=2)
        settings: dict[str, Any] = {
            "colors": palette(len(class_names)),
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        }
        assumed = {"colors": "generated ones are used", "mean": "ImageNet's is assumed", "std": "ImageNet's is assumed"}
        for name in settings:
            if name in metadata:
                settings[name] = list(metadata[name])
            else:
                warnings.warn(f"the checkpoint's metadata names no {name}: {assumed[name]}", stacklevel=2)
        colors = [(int(red), int(green), int(blue)) for red, green, blue in settings["colors"]]
        data = metadata.get("data")
        crop = tuple(data["crop"]) if isinstance(data, Mapping) and data.get("crop") else None
        return cls(model.to(device).eval(), class_names, colors, settings["mean"], settings["std"], crop=crop)

    @overload
    def __call__(self, image: Tensor) -> Tensor: ...

    @overload
    def __call__(self, image: Image | str | os.PathLike[str]) -> NDArray[np.uint8]: ...

    @torch.inference_mode()
    def __call__(self, image: Tensor | Image | str | os.PathLike[str]) -> Tensor | NDArray[np.uint8]:
        """Map an image to its label map (H, W) uint8 on the CPU.

        Args:
            image: a file; RGB (H, W, 3), uint8, uint16, or float in 0..255; or a tensor (3, H, W), normalised already,
                whose label map is a tensor too.

        Raises:
            DataError: the file is no image (a ValueError).
            ValueError: an array of another shape.
        """
        if isinstance(image, Tensor):
            return predict_labels(self.model, image[None].to(self.device))[0].to(torch.uint8).cpu()
        pixels = read_image(Path(image)) if isinstance(image, str | os.PathLike) else image
        return self.predict([pixels])[0].labels

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    def in_windows(self) -> "Predictor | None":
        """The same in windows of ``crop``, for images that do not fit; None if it is not known, or used already."""
        if self.crop is None or self.protocol.crop is not None:
            return None
        return replace(self, protocol=Protocol.of("whole", crop=self.crop))

    def optimized(self) -> "Predictor":
        """The same with the model as :func:`pspnet_fast.optimize` returns it: faster, and frozen."""
        return replace(self, model=optimize(self.model))

    @torch.inference_mode()
    def predict(
        self, images: Sequence[Image], *, confidence: bool = False, probabilities: bool = False
    ) -> list[Prediction]:
        """Predict images of one size together, as ``protocol`` says.

        Args:
            images: RGB (H, W, 3), uint8, uint16, or float in 0..255.
            confidence, probabilities: what to return beside the labels.

        Raises:
            ValueError: images of another shape, or of several sizes.
            MemoryError: on Linux, on a CPU, where they will not fit into the memory that is left.
        """
        if not images:
            return []
        classes, certain, every = self._maps(images, confidence, probabilities)
        return [
            Prediction(
                classes[index].to("cpu", torch.uint8).numpy(),
                None if certain is None else certain[index].to("cpu", torch.float32).numpy(),
                None if every is None else every[index].to("cpu", torch.float32).numpy(),
            )
            for index in range(len(images))
        ]

    @property
    def _segmenter(self) -> Segmenter:
        return Segmenter(self.model, len(self.class_names), self.mean, self.std, self.protocol)

    @cached_property
    def _cost(self) -> Cost | None:
        """What the model takes; None on a GPU, which tells that its memory is full, and where it cannot be measured."""
        try:
            return measure(self._segmenter, *_PROBE) if self.device.type == "cpu" else None
        except ValueError:
            return None

    def _maps(
        self, images: Sequence[Image], confidence: bool, probabilities: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Classes (N, H, W), their confidence (N, H, W) and all probabilities (N, K, H, W), on the model's device.

        Here alone it is settled how an image becomes maps.
        """
        _check(images)
        segmenter, (height, width) = self._segmenter, images[0].shape[:2]
        if len(images) * height * width > _SMALL and self._cost is not None:
            segmenter = fit_what_is_free(segmenter, self._cost, len(images), height, width)
        return segmenter.maps(images, confidence, probabilities)


def _check(images: Sequence[Image]) -> None:
    shapes = [tuple(image.shape) for image in images]
    if len(set(shapes)) > 1:
        raise ValueError(f"images must be of one size, got {shapes}")
    if len(shapes[0]) != 3 or shapes[0][2] != 3 or 0 in shapes[0]:
        raise ValueError(f"image must be RGB of shape (height, width, 3), got {shapes[0]}")
