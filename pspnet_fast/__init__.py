"""Fused CPU and CUDA kernels for PSPNet (Zhao et al., CVPR 2017): pyramid pooling, the model and its trainer."""

from . import ops, reference
from .fusion import fuse, unfuse
from .head import FusedPSPHead
from .losses import UpsampleCrossEntropyLoss
from .models import PSPNet
from .modules import FusedPPM
from .region_losses import UpsampleDiceLoss, UpsampleLovaszLoss
from .upsample_concat import FusedUpsampleConcat

__version__ = "0.1.0"
__all__ = [
    "FusedPPM",
    "FusedPSPHead",
    "FusedUpsampleConcat",
    "PSPNet",
    "UpsampleCrossEntropyLoss",
    "UpsampleDiceLoss",
    "UpsampleLovaszLoss",
    "fuse",
    "ops",
    "reference",
    "unfuse",
]
