"""Training and evaluation of a PSPNet."""

from pspnet_fast.training.config import ConfigError, TrainConfig, load_config
from pspnet_fast.training.loop import TrainResult, evaluate, fit
from pspnet_fast.training.metrics import Metrics

__all__ = ["ConfigError", "Metrics", "TrainConfig", "TrainResult", "evaluate", "fit", "load_config"]
