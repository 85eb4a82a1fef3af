"""The operators: CPU and CUDA kernels with gradients; pspnet_fast.reference holds the same in plain PyTorch."""

from . import portable as portable  # which registers what other devices run
from .confusion_matrix import confusion_matrix
from .kept_memory import keep_memory
from .pyramid_batch_norm import pyramid_batch_norm
from .pyramid_context import pyramid_context_
from .pyramid_pool import new_concat, pyramid_pool
from .pyramid_reduce import pyramid_reduce
from .pyramid_split_weight import pyramid_split_weight
from .pyramid_upsample_concat import pyramid_upsample_concat_
from .upsample_argmax import upsample_argmax
from .upsample_cross_entropy import upsample_cross_entropy
from .upsample_softmax_accumulate import upsample_softmax_accumulate_

__all__ = [
    "confusion_matrix",
    "keep_memory",
    "new_concat",
    "pyramid_batch_norm",
    "pyramid_context_",
    "pyramid_pool",
    "pyramid_reduce",
    "pyramid_split_weight",
    "pyramid_upsample_concat_",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_softmax_accumulate_",
]
