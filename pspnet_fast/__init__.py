"""Fused CPU and CUDA kernels for PSPNet (Zhao et al., CVPR 2017): pyramid pooling, the model and its trainer."""

from typing import TYPE_CHECKING, Any

from . import ops, reference
from .fusion import fuse, unfuse
from .head import FusedPSPHead
from .losses import UpsampleCrossEntropyLoss
from .models import PSPNet
from .modules import FusedPPM
from .optimization import optimize
from .region_losses import UpsampleDiceLoss, UpsampleLovaszLoss
from .upsample_concat import FusedUpsampleConcat

if TYPE_CHECKING:
    from .inference.predict import Predictor as Predictor

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
    "optimize",
    "reference",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    """``Predictor`` on demand: it needs pspnet_fast[train], which operators and modules do without."""
    if name == "Predictor":
        from .inference.predict import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
