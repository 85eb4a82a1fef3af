"""Typed configuration: dataclasses, filled from a YAML file and ``key=value`` overrides through OmegaConf."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pspnet_fast.data.conventions import CONVENTIONS, Remap


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and what is allowed."""


def _check(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")


def _check_size(key: str, value: Sequence[int]) -> None:
    _check(len(value) == 2 and min(value) >= 1, key, list(value), "[height, width], both at least 1")


@dataclass
class ModelConfig:
    """Arguments of :class:`pspnet_fast.models.PSPNet`, which checks their values."""

    backbone: str = "resnet50"
    stem: str = "deep64"
    dilation: str = "full"
    output_stride: int = 8
    bins: list[int] | None = field(default_factory=lambda: [1, 2, 3, 6])
    aux: bool = True
    dropout: float = 0.1
    align_corners: bool = True
    head: str = "fused"
    head_channels: int | None = None


@dataclass
class DataConfig:
    """Files and transforms. A relative ``root`` starts at the current directory, the files at ``root``."""

    root: str = "data"
    train_list: str = "train.txt"
    val_list: str = "val.txt"
    names: str = "names.txt"
    colors: str = "colors.txt"
    """May be missing; the classes then get colours that differ well."""
    labels: str = "index"
    """What the values of label files mean: index, from_one, ade20k, cityscapes, voc or color (see docs/data.md)."""
    remap: dict[Any, Any] = field(default_factory=dict)
    """Class of each label value, in place of ``labels``: {0: 0, 255: 1, other: 255}; 255 is ignored."""
    crop: list[int] = field(default_factory=lambda: [473, 473])
    """Height and width of a training crop."""
    val_crop: list[int] | None = None
    """Height and width of the validation crop from the image's centre; null validates on whole images."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Per channel, for images in 0..1."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Range of the random resize factor."""
    degrees: list[float] = field(default_factory=lambda: [-10.0, 10.0])
    """Range of the random rotation."""
    blur: bool = True
    """Blur half of the training images."""

    def __post_init__(self) -> None:
        _check_size("data.crop", self.crop)
        if self.val_crop is not None:
            _check_size("data.val_crop", self.val_crop)
        for key, value in (("data.mean", self.mean), ("data.std", self.std)):
            _check(len(value) == 3, key, value, "three numbers, for images in 0..1")
        _check(self.labels in CONVENTIONS, "data.labels", self.labels, f"one of {', '.join(CONVENTIONS)}")
        try:
            Remap.parse(self.remap)
        except ValueError as error:
            raise ConfigError(f"data.remap {error}") from None
        _check(min(self.std) > 0, "data.std", self.std, "above 0")
        _check(len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], "data.scale", self.scale, "0 < low <= high")
        _check(
            len(self.degrees) == 2 and self.degrees[0] <= self.degrees[1], "data.degrees", self.degrees, "low <= high"
        )


@dataclass
class TrainConfig:
    """Optimisation, schedule and machine; what :func:`pspnet_fast.training.fit` needs."""

    epochs: int = 50
    batch_size: int = 16
    val_batch_size: int = 1
    """More than 1 needs validation images of one size (see data.val_crop)."""
    lr: float = 0.01
    """Of the backbone, at the first iteration; poly: lr * (1 - step / steps) ** power."""
    head_lr_factor: float = 10.0
    """Learning rate of ppm, cls and aux over that of the backbone."""
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 1e-4
    aux_weight: float = 0.4
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None
    """A factor a class, for both losses."""
    ohem: bool = False
    """Only hard pixels count (online hard example mining), for both losses."""
    ohem_threshold: float = 0.7
    """Pixels whose label has a lower probability are hard."""
    ohem_min_kept: int = 100000
    """Pixels an image that count at least."""
    seed: int = 0
    bf16: bool = False
    """Run the model under bfloat16 autocast; weights, losses and metrics stay float32."""
    channels_last: bool = False
    device: str = "auto"
    """"auto" (CUDA where there is a GPU), "cpu", "cuda" or "cuda:N"."""
    workers: int = 2
    """DataLoader processes; 0 loads in the main process. The results do not depend on it."""
    log_every: int = 10
    """Iterations between two looks at the losses (each costs one wait for a GPU)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "val_batch_size", "log_every"):
            _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("lr", "head_lr_factor", "power"):
            _check(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "above 0")
        for name in ("weight_decay", "aux_weight", "seed", "workers", "ohem_min_kept"):
            _check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        _check(0 <= self.label_smoothing <= 1, "train.label_smoothing", self.label_smoothing, "from 0 to 1")
        _check(0 < self.ohem_threshold <= 1, "train.ohem_threshold", self.ohem_threshold, "above 0 and at most 1")
        if self.class_weights is not None:
            _check(min(self.class_weights, default=-1) >= 0, "train.class_weights", self.class_weights, "at least 0")
        _check(0 <= self.momentum < 1, "train.momentum", self.momentum, "at least 0 and below 1")


@dataclass
class Config:
    """A whole configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file over the defaults, then apply ``key=value`` overrides such as ``train.lr=0.02``.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: the file is no YAML mapping, a key is unknown (the message names the nearest valid one), a value
            has the wrong type or lies outside its range.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"an override must be key=value, got {override!r}")
    try:
        document = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    config = _merge(OmegaConf.structured(Config), document, str(path))
    config = _merge(config, OmegaConf.from_dotlist(list(overrides)), "command line")
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


def _merge(config: Any, document: Any, source: str) -> Any:
    """Put the values of ``document`` over ``config``, refusing unknown keys and wrong types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    types = _check_keys(OmegaConf.to_container(document), source)
    try:
        return OmegaConf.merge(config, document)
    except OmegaConfBaseException as error:
        key = str(error.full_key).partition("[")[0]
        allowed = types[key].__name__ if types[key] in (bool, int, float, str) else types[key]
        if types[key] == dict[Any, Any]:
            allowed = 'a mapping, with blanks and on a command line in quotes: "{0: 0, 255: 1}"'
        raise ConfigError(f"{source}: {key} must be {allowed}, got {OmegaConf.select(document, key)!r}") from None


def _check_keys(document: Any, source: str) -> dict[str, Any]:
    """Refuse keys that no dataclass has, naming the nearest that exists; return the type of each that does."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"{source}: must be a mapping with the keys model, data and train")
    sections: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
    types = {f"{name}.{entry.name}": entry.type for name in sections for entry in dataclasses.fields(sections[name])}
    for name, values in document.items():
        if name in sections and not isinstance(values, Mapping):
            raise ConfigError(f"{source}: {name} must be a mapping, got {values!r}")
        for key in [f"{name}.{entry}" for entry in values] if isinstance(values, Mapping) else [str(name)]:
            if key not in types:
                nearest = difflib.get_close_matches(key, types, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{source}: unknown key {key!r}; the nearest valid key is {nearest!r}")
    return types
