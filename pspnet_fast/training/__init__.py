"""Training and evaluation of a PSPNet."""

from pspnet_fast.training.callbacks import Callback
from pspnet_fast.training.config_file import load_config
from pspnet_fast.training.config_rules import ConfigError
from pspnet_fast.training.config_train import TrainConfig
from pspnet_fast.training.evaluation import evaluate
from pspnet_fast.training.interruption import Interrupted
from pspnet_fast.training.loop import TrainResult, fit
from pspnet_fast.training.metrics import Metrics
from pspnet_fast.training.run_folder import ResumeError

__all__ = [
    "Callback",
    "ConfigError",
    "Interrupted",
    "Metrics",
    "ResumeError",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "fit",
    "load_config",
]
