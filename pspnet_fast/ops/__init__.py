"""The operators: CPU and CUDA kernels with gradients; pspnet_fast.reference holds the same in plain PyTorch."""

from .pyramid_pool import pyramid_pool
from .pyramid_reduce import pyramid_reduce
from .pyramid_upsample_concat import pyramid_upsample_concat_
from .upsample_cross_entropy import upsample_cross_entropy

__all__ = ["pyramid_pool", "pyramid_reduce", "pyramid_upsample_concat_", "upsample_cross_entropy"]
