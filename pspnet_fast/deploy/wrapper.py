"""What an exported program computes around a model: the image's normalisation before it, classes after it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast.models import PSPNet

from .any_size import resize


class Deployed(nn.Module):
    """A model from images to logits or classes.

    Args:
        model: images (N, 3, H, W) -> logits (N, K, h, w), alone, as {"out": logits} or as `.logits`.
        argmax: whether to return the class of every pixel, (N, H, W), not logits.
        normalise: (mean, std) of each channel for images in 0..1; images are then (N, H, W, 3) uint8.

    Attributes:
        any_size: whether the logits' size is asked of the image at run time, by an operator that only ONNX has.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, argmax: bool, normalise: tuple[Sequence[float], Sequence[float]] | None
    ) -> None:
        super().__init__()
        self.any_size = False
        self.model, self.argmax, self.normalise = model, argmax, normalise is not None
        # torch's default, as mmsegmentation, transformers and torchvision upsample logits
        self.align_corners = bool(getattr(model, "align_corners", False))
        if normalise is not None:
            mean, std = (255 * torch.tensor(values, dtype=torch.float32) for values in normalise)
            if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
                raise ValueError(f"normalise must be (mean, std) of 3 channels, std above 0, but is {normalise!r}")
            self.register_buffer("scale", (1 / std).view(3, 1, 1))
            self.register_buffer("shift", (-mean / std).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """An image -> logits, or classes."""
        given = image
        if self.normalise:
            image = image.permute(0, 3, 1, 2).float() * self.scale + self.shift
        logits = logits_of(self.model(image))
        if self.argmax or isinstance(self.model, PSPNet):
            if self.any_size:
                logits = resize(logits, given, 1 if self.normalise else 2, self.align_corners)
            else:
                size = (image.size(2), image.size(3))
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)
        if not self.argmax:
            return logits
        return logits.argmax(1).to(torch.uint8 if logits.size(1) <= 256 else torch.int32)


def logits_of(output: Any) -> Tensor:
    """The logits among what a model returns.

    Raises:
        ValueError: there are none.
    """
    if isinstance(output, Mapping) and "out" in output:
        output = output["out"]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() != 4:
        raise ValueError(
            "model must return logits (N, K, h, w), alone, as {'out': logits} or as .logits, but returns a "
            f"{type(output).__name__}"
        )
    return output
