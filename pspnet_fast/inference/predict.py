"""Label maps of whole images, of any size."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pspnet_fast import ops
from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from pspnet_fast.inference.render import palette
from pspnet_fast.models import PSPNet


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


@dataclass(frozen=True)
class Predictor:
    """A trained model with all that prediction needs.

    Attributes:
        model: in evaluation mode, on its device.
        class_names, colors: by class index; a colour is (red, green, blue) in 0..255.
        mean, std: per channel, for images in 0..1.
    """

    model: nn.Module
    class_names: list[str]
    colors: list[tuple[int, int, int]]
    mean: list[float]
    std: list[float]

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any], device: torch.device) -> "Predictor":
        """Build the model from a checkpoint of :func:`pspnet_fast.training.fit`; docs/checkpoints.md has its keys.

        Where the checkpoint names no colours, mean or std, it warns and takes generated colours and ImageNet's values.

        Raises:
            ValueError: the checkpoint does not describe its model, its weights do not fit the description, or it has
                more classes than labels can hold.
        """
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
        return cls(model.to(device).eval(), class_names, colors, settings["mean"], settings["std"])

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Map a normalised image (3, H, W) to its label map (H, W) uint8 on the CPU."""
        device = next(self.model.parameters()).device
        return predict_labels(self.model, image[None].to(device))[0].to(torch.uint8).cpu()
