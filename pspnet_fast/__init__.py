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
    from .deploy import export as export
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
    "export",
    "fuse",
    "ops",
    "optimize",
    "reference",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    """``Predictor``, which needs pspnet_fast[train], and ``export`` on demand: operators and modules do without."""
    if name == "export":
        from .deploy import export

        return export
    if name == "Predictor":
        from .inference.predict import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
