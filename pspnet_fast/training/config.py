"""Typed configuration: dataclasses, which :func:`pspnet_fast.training.config_file.load_config` fills.

The docstring of a field is its meaning and RULES holds what it may be: for the check, its message, and the comments of
:func:`pspnet_fast.training.config_text.to_yaml`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pspnet_fast.data.conventions import CONVENTIONS, ORIENTATIONS, Remap
from pspnet_fast.data.layouts import LAYOUTS
from pspnet_fast.models.pspnet import Head
from pspnet_fast.models.resnet import BACKBONES, DILATIONS, OUTPUT_STRIDES, STEMS


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and what is allowed."""


def _check(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class Rule:
    """What a setting may be, in words and as a test; null passes where the type allows it."""

    allowed: str
    holds: Callable[[Any], bool]


def _at_least(low: float) -> Rule:
    return Rule(f"at least {low}", lambda value: low <= value)


def _one_of(values: Collection[object]) -> Rule:
    return Rule(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


_LAYOUTS_OWN = "auto"
_ABOVE_0 = Rule("above 0", lambda value: value > 0)

RULES = {
    "model.backbone": _one_of(BACKBONES),
    "model.stem": _one_of(STEMS),
    "model.dilation": _one_of(DILATIONS),
    "model.output_stride": _one_of(OUTPUT_STRIDES),
    "model.bins": Rule("one or more numbers of at least 1", lambda value: bool(value) and min(value) >= 1),
    "model.dropout": Rule("at least 0 and below 1", lambda value: 0 <= value < 1),
    "model.head": _one_of(get_args(Head)),
    "model.head_channels": _at_least(1),
    "data.root": Rule("the name of a folder", bool),
    "data.layout": _one_of(LAYOUTS),
    "data.labels": _one_of((_LAYOUTS_OWN, *CONVENTIONS)),
    "data.orientation": _one_of(ORIENTATIONS),
    "data.unreadable": _one_of(("error", "skip")),
    "data.cache_gb": _at_least(0),
    "train.epochs": _at_least(1),
    "train.batch_size": _at_least(1),
    "train.val_batch_size": _at_least(1),
    "train.lr": _ABOVE_0,
    "train.head_lr_factor": _ABOVE_0,
    "train.power": _ABOVE_0,
    "train.momentum": Rule("at least 0 and below 1", lambda value: 0 <= value < 1),
    "train.weight_decay": _at_least(0),
    "train.aux_weight": _at_least(0),
    "train.label_smoothing": Rule("from 0 to 1", lambda value: 0 <= value <= 1),
    "train.class_weights": Rule(
        "at least 0 each and not all 0", lambda value: min(value, default=-1) >= 0 and max(value) > 0
    ),
    "train.ohem_threshold": Rule("above 0 and at most 1", lambda value: 0 < value <= 1),
    "train.ohem_min_kept": _at_least(0),
    "train.seed": _at_least(0),
    "train.workers": _at_least(0),
    "train.log_every": _at_least(1),
}


def _check_rules(section: str, settings: Any) -> None:
    """Raise ConfigError for the first field that its rule does not allow, or that is no finite number."""
    for entry in dataclasses.fields(settings):
        key, value = f"{section}.{entry.name}", getattr(settings, entry.name)
        for number in value if isinstance(value, list) else [value]:
            _check(not isinstance(number, float) or math.isfinite(number), key, value, "finite")
        if key in RULES and value is not None:
            _check(RULES[key].holds(value), key, value, RULES[key].allowed)


def _check_size(key: str, value: Sequence[int]) -> None:
    _check(len(value) == 2 and min(value) >= 1, key, list(value), "[height, width], both at least 1")


@dataclass
class ModelConfig:
    """Arguments of :class:`pspnet_fast.models.PSPNet`."""

    backbone: str = "resnet50"
    """The encoder."""
    stem: str = "deep64"
    """First layers: three 3x3 convolutions with 64 (semseg) or 32 channels, or one 7x7."""
    dilation: str = "full"
    """Of the first block of a stage that lost its stride: as in the others, or half (contracted)."""
    output_stride: int = 8
    """Size of the image over that of the logits; 16 is about a third of the work of 8."""
    bins: list[int] | None = field(default_factory=lambda: [1, 2, 3, 6])
    """Sizes of the pyramid's grids; null leaves the pyramid out."""
    aux: bool = True
    """Train a second classifier on layer3."""
    dropout: float = 0.1
    """Probability of dropping a channel before the classifiers."""
    align_corners: bool = True
    """Convention of all upsampling."""
    head: str = "fused"
    """Without the concatenation, or with it; the weights are the same."""
    head_channels: int | None = None
    """Before the classifier; null takes a quarter of the backbone's."""

    def __post_init__(self) -> None:
        _check_rules("model", self)


@dataclass
class DataConfig:
    """Files and transforms. A relative ``root`` starts at the current directory, the files at ``root``.

    In all of these names ``~`` and environment variables (``$NAME``) are replaced.
    """

    root: str = "data"
    """Folder of the data."""
    layout: str | None = None
    """Folders as a data set is published, or folders: images/train, labels/train; null reads the lists."""
    train_split: str | None = None
    """Of a layout; null takes its own, A+B takes both."""
    val_split: str | None = None
    """Likewise, for validation."""
    images: str | None = None
    """Where images lie, in place of the layout's own: images/{split}/{name}.*"""
    label_files: str | None = None
    """Likewise, labels: labels/{split}/{name}_mask.png"""
    train_list: str = "train.txt"
    """Without a layout: a line an image, IMAGE LABEL, relative to root."""
    val_list: str = "val.txt"
    """Likewise, for validation."""
    names: str = "names.txt"
    """A class a line, by index; without this file a published layout has its own."""
    colors: str = "colors.txt"
    """R G B a line, by index; without this file the layout's, or colours that differ well."""
    labels: str = _LAYOUTS_OWN
    """What the values of label files mean (docs/data.md); auto is what the layout has, index without one."""
    remap: dict[Any, Any] = field(default_factory=dict)
    """Class of each label value, in place of labels: {0: 0, 255: 1, other: 255}; 255 is ignored."""
    orientation: str = "auto"
    """Of photographs with EXIF: turned or stored, as their labels were drawn, or auto by the labels' size."""
    unreadable: str = "error"
    """What a missing or damaged image or label does: it ends the run, or is skipped, named and counted."""
    cache_gb: float = 0.0
    """Shared memory for decoded training images, 10^9 bytes; 4 bytes a pixel are needed."""
    crop: list[int] = field(default_factory=lambda: [473, 473])
    """Height and width of a training crop."""
    val_crop: list[int] | None = None
    """Height and width of the validation crop from the image's centre; null validates on whole images."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Of each channel, for images in 0..1."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Likewise, the standard deviation."""
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
        _check_rules("data", self)
        layout = None if self.layout is None else LAYOUTS[self.layout]
        if self.labels == _LAYOUTS_OWN:
            self.labels = "index" if layout is None or self.remap else layout.convention
        if layout is None:
            for name in ("train_split", "val_split", "images", "label_files"):
                value = getattr(self, name)
                _check(value is None, f"data.{name}", value, f"null without a data.layout ({', '.join(LAYOUTS)})")
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
    """Passes over the training list."""
    batch_size: int = 16
    """Images an iteration; an incomplete last batch is left out."""
    val_batch_size: int = 1
    """More than 1 needs validation images of one size (see data.val_crop)."""
    lr: float = 0.01
    """Of the backbone, at the first iteration; poly: lr * (1 - step / steps) ** power."""
    head_lr_factor: float = 10.0
    """Learning rate of ppm, cls and aux over that of the backbone."""
    power: float = 0.9
    """Of the poly schedule."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Of all parameters."""
    aux_weight: float = 0.4
    """Factor of the auxiliary loss."""
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes alike."""
    class_weights: list[float] | None = None
    """A factor a class, for both losses."""
    ohem: bool = False
    """Only hard pixels count (online hard example mining), for both losses."""
    ohem_threshold: float = 0.7
    """Pixels whose label has a lower probability are hard."""
    ohem_min_kept: int = 100000
    """Pixels an image that count at least."""
    seed: int = 0
    """Of initial weights, order, transforms and dropout."""
    bf16: bool = False
    """Run the model under bfloat16 autocast; weights, losses and metrics stay float32."""
    channels_last: bool = False
    """Memory format; often faster for convolutions."""
    device: str = "auto"
    """auto (CUDA where there is a GPU), cpu, cuda or cuda:N."""
    workers: int = 2
    """DataLoader processes; 0 loads in the main process. The results do not depend on it."""
    log_every: int = 10
    """Iterations between two looks at the losses (each costs one wait for a GPU)."""

    def __post_init__(self) -> None:
        _check_rules("train", self)


@dataclass
class Config:
    """A whole configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
