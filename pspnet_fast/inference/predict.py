"""Label maps of whole images, of any size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pspnet_fast import ops
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
        """Build the model from a checkpoint that ``pspnet-fast train`` saved.

        Raises:
            ValueError: the checkpoint does not describe its model (``fit`` was called without ``metadata``).
        """
        metadata, class_names = checkpoint["metadata"], checkpoint["class_names"]
        if "model" not in metadata:
            raise ValueError("checkpoint does not describe its model; those of `pspnet-fast train` do")
        model = PSPNet(len(class_names), **metadata["model"])
        model.load_state_dict(checkpoint["model"])
        colors = [(red, green, blue) for red, green, blue in metadata["colors"]]
        return cls(model.to(device).eval(), class_names, colors, metadata["mean"], metadata["std"])

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Map a normalised image (3, H, W) to its label map (H, W) uint8 on the CPU."""
        device = next(self.model.parameters()).device
        return predict_labels(self.model, image[None].to(device))[0].to(torch.uint8).cpu()
