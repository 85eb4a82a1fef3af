"""Typed configuration: dataclasses, which :func:`pspnet_fast.training.config_file.load_config` fills.

The docstring of a field is its meaning and RULES holds what it may be: for the check, its message, and the comments of
:func:`pspnet_fast.training.config_text.to_yaml`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pspnet_fast.data.conventions import CONVENTIONS, ORIENTATIONS, Remap
from pspnet_fast.data.layouts import LAYOUTS
from pspnet_fast.models.pspnet import Head
from pspnet_fast.models.resnet import BACKBONES, DILATIONS, OUTPUT_STRIDES, STAGES, STEMS
from pspnet_fast.modules import Concat
from pspnet_fast.training.config_rules import SHARE, ConfigError, Rule, at_least, check, check_rules, one_of
from pspnet_fast.training.config_train import TRAIN_RULES, TrainConfig

_LAYOUTS_OWN = "auto"
_ODD = Rule("odd and at least 1", lambda value: value >= 1 and value % 2 == 1)

RULES = {
    "model.backbone": one_of(BACKBONES),
    "model.stem": one_of(STEMS),
    "model.dilation": one_of(DILATIONS),
    "model.output_stride": one_of(OUTPUT_STRIDES),
    "model.bins": Rule("one or more numbers of at least 1", lambda value: bool(value) and min(value) >= 1),
    "model.dropout": SHARE,
    "model.head": one_of(get_args(Head)),
    "model.head_channels": at_least(1),
    "model.stages": one_of(STAGES),
    "model.concat": one_of(get_args(Concat)),
    "model.reduction_channels": at_least(1),
    "model.bottleneck_kernel": _ODD,
    "model.classifier_kernel": _ODD,
    "data.root": Rule("the name of a folder", bool),
    "data.layout": one_of(LAYOUTS),
    "data.labels": one_of((_LAYOUTS_OWN, *CONVENTIONS)),
    "data.orientation": one_of(ORIENTATIONS),
    "data.unreadable": one_of(("error", "skip")),
    "data.cache_gb": at_least(0),
    **TRAIN_RULES,
}


def _check_size(key: str, value: Sequence[int]) -> None:
    check(len(value) == 2 and min(value) >= 1, key, list(value), "[height, width], both at least 1")


@dataclass
class ModelConfig:
    """Arguments of :class:`pspnet_fast.models.PSPNet`, and the weights that it starts from."""

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
    avg_down: bool = False
    """Shortcuts pool where they would stride, as in ResNet-D."""
    stages: int = 4
    """Of the backbone: 2 ends with layer2."""
    concat: str = "input_first"
    """The features before the pyramid's levels, or after them."""
    reduction_channels: int | None = None
    """Of each level of the pyramid; null takes the backbone's over the number of levels."""
    bin1_norm: bool = True
    """Whether the level of one cell has a norm; else its convolution has a bias."""
    bottleneck_kernel: int = 3
    """Size of the convolution after the pyramid."""
    classifier_kernel: int = 1
    """Size of the last convolution."""
    pretrained: str | None = None
    """File of the backbone's first weights: of torchvision, timm, semseg or mmsegmentation (docs/training.md)."""

    def __post_init__(self) -> None:
        check_rules("model", self, RULES)


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
    """What a damaged image or label does: it ends the run, or is skipped, named and counted."""
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
            check(len(value) == 3, key, value, "three numbers, for images in 0..1")
        check_rules("data", self, RULES)
        layout = None if self.layout is None else LAYOUTS[self.layout]
        if self.labels == _LAYOUTS_OWN:
            self.labels = "index" if layout is None or self.remap else layout.convention
        if layout is not None and self.labels == layout.convention and not self.remap:
            self.remap = dict(layout.remap)
        if layout is None:
            for name in ("train_split", "val_split", "images", "label_files"):
                value = getattr(self, name)
                check(value is None, f"data.{name}", value, f"null without a data.layout ({', '.join(LAYOUTS)})")
        try:
            Remap.parse(self.remap)
        except ValueError as error:
            raise ConfigError(f"data.remap {error}") from None
        check(min(self.std) > 0, "data.std", self.std, "above 0")
        check(len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], "data.scale", self.scale, "0 < low <= high")
        check(
            len(self.degrees) == 2 and self.degrees[0] <= self.degrees[1], "data.degrees", self.degrees, "low <= high"
        )


@dataclass
class Config:
    """A whole configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
