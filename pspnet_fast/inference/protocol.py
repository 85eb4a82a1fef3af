"""Test protocols: at which sizes, in which windows and by which averages an image is predicted."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PRESETS = ("whole", "semseg", "mmseg")
AVERAGES = ("probabilities", "logits")
SIZES = ("long", "fit")
ABSENT = ("skip", "zero", "one", "nan")
_OPEN = {  # what the published protocol leaves to its user
    "whole": set[str](),
    "semseg": {"base_size", "scales", "crop"},
    "mmseg": {"base_size", "scales", "flip", "crop", "stride_rate"},
}


@dataclass(frozen=True)
class Protocol:
    """How an image is predicted, and how absent classes count; by default whole, at its own size.

    Attributes:
        preset: the name that these settings go by, None where they are nobody's.
        base_size: what scale 1 is; None is the image's own size. With ``sizes`` "long" (length,), that of the longer
            side; with "fit" (long, short), the box into which the image is fitted.
        scales: factors of that size; their probabilities are averaged.
        flip: whether the mirrored image is averaged in at each scale.
        crop: (height, width) of the windows; None predicts each scaled image whole.
        stride_rate: step of the windows over their extent; the last one is moved inside.
        pad: whether a scaled image smaller than the crop is padded with the mean on both sides, the odd pixel after;
            else its window is smaller.
        average: of overlapping windows. "probabilities": softmax, averaged, with flip that of the mirrored window as
            well, then resized to the image with half-pixel centres. "logits": averaged, resized to the image with the
            model's ``align_corners``, then softmax; with flip the windows of the mirrored image are another prediction.
            Without a crop, "probabilities" interpolates the model's logits straight to the size of the image, "logits"
            first to that of the scaled image.
        sizes: "long": the longer side is round(scale * base), the other in proportion; "fit": sides round half up.
        rounded: whether the scaled image keeps the 8 or 16 bits a channel of its file; else it is float32.
        absent: what a class without a score counts in means: "skip" nothing, "zero" 0, "one" 1, "nan" makes them NaN.

    Raises:
        ValueError: a setting is outside its range, or two do not go together; the message names it.
    """

    preset: str | None = "whole"
    base_size: tuple[int, ...] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    crop: tuple[int, int] | None = None
    stride_rate: float = 2 / 3
    pad: bool = False
    average: str = "probabilities"
    sizes: str = "long"
    rounded: bool = False
    absent: str = "skip"

    def __post_init__(self) -> None:
        for name, allowed in (("average", AVERAGES), ("sizes", SIZES), ("absent", ABSENT)):
            _check(getattr(self, name) in allowed, name, getattr(self, name), " or ".join(allowed))
        _check(self.preset is None or self.preset in PRESETS, "preset", self.preset, f"None or one of {PRESETS}")
        _check(bool(self.scales) and min(self.scales) > 0, "scales", self.scales, "one or more numbers above 0")
        _check(0 < self.stride_rate <= 1, "stride_rate", self.stride_rate, "above 0 and at most 1")
        if self.crop is not None:
            _check(len(self.crop) == 2 and min(self.crop) >= 1, "crop", self.crop, "(height, width), both at least 1")
        _check(not self.pad or self.crop is not None, "pad", self.pad, "False without a crop")
        if self.base_size is not None:
            sides = {"long": (1, "(length of the longer side,)"), "fit": (2, "(long side, short side)")}[self.sizes]
            fits = len(self.base_size) == sides[0] and min(self.base_size) >= 1
            _check(fits, "base_size", self.base_size, f"{sides[1]} for sizes {self.sizes!r}")
            single = self.sizes == "long" or (self.scales == (1.0,) and not self.flip)
            _check(single, "base_size", self.base_size, "None with scales or flip: mmseg's are of the image's own size")

    @classmethod
    def of(cls, preset: str, **changes: Any) -> "Protocol":
        """A preset, with other values for some of its settings; beyond those that it leaves open it has no name then.

        "semseg": hszhao/semseg's ``tool/test.py``: windows of 473x473, flip, absent classes as 0; its ``base_size``
        is 512 for ADE20K and VOC, 2048 for Cityscapes. "mmseg": mmsegmentation 1.2.2's ``EncoderDecoder``: whole
        images without flip, or windows where ``crop`` is given; scales and flip as its ``SegTTAModel``. "whole":
        whole images; with a crop windows of probabilities, not padded.
        """
        _check(preset in PRESETS, "preset", preset, f"one of {PRESETS}")
        settings: dict[str, Any] = {"preset": preset}
        if preset == "semseg":
            settings |= {"crop": (473, 473), "flip": True, "pad": True, "absent": "zero"}
        elif preset == "mmseg":
            settings |= {"average": "logits", "sizes": "fit", "rounded": True}
        if not changes.keys() <= _OPEN[preset]:
            settings["preset"] = None
        return cls(**(settings | changes))

    @property
    def plain(self) -> bool:
        """Whether one forward pass of the image as it is tells all."""
        return self.base_size is None and self.crop is None and self.scales == (1.0,) and not self.flip

    def scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """(height, width) of an image at a scale."""
        if self.sizes == "long":
            side = max(height, width)
            longer = round(scale * (self.base_size[0] if self.base_size else side))
            sizes = [longer if extent == side else round(longer / side * extent) for extent in (height, width)]
            return max(sizes[0], 1), max(sizes[1], 1)
        box = self.base_size or (int(width * scale + 0.5), int(height * scale + 0.5))
        factor = min(max(box) / max(height, width), min(box) / min(height, width))
        return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)

    def window_starts(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """First rows and first columns of the windows in a scaled, padded image."""
        assert self.crop is not None
        starts = []
        for extent, crop in zip((height, width), self.crop, strict=True):
            stride, rest = math.ceil(crop * self.stride_rate), max(extent - crop, 0)
            starts.append([min(index * stride, rest) for index in range(math.ceil(rest / stride) + 1)])
        return starts[0], starts[1]

    def padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels added to a scaled image above, below, left and right."""
        if not self.pad or self.crop is None:
            return 0, 0, 0, 0
        rows, columns = max(self.crop[0] - height, 0), max(self.crop[1] - width, 0)
        return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2

    def record(self) -> dict[str, Any]:
        """The settings as plain data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Protocol":
        """The protocol of :meth:`record`."""
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        return cls(**settings)

    def describe(self) -> list[str]:
        """The protocol in words, a sentence each."""
        own = {"semseg": "as semseg's tool/test.py has it", "mmseg": "as mmsegmentation 1.2.2 has it"}
        name = own.get(self.preset or "", "")
        size = self._size_text() + (f" ({name})" if name else "")
        return [size, self._window_text(), self._average_text(), absent_text(self.absent)]

    def _size_text(self) -> str:
        scales = ", ".join(f"{scale:g}" for scale in self.scales)
        size = "its own size"
        if self.base_size is not None:
            size = f"a longer side of {self.base_size[0]} pixels"
            if self.sizes == "fit":
                size = f"the size that fits into {self.base_size[0]}x{self.base_size[1]}"
        text = f"each image at {size}"
        if self.scales != (1.0,):
            text += f" times {scales}"
        return text + (", and mirrored" if self.flip else ", not mirrored")

    def _window_text(self) -> str:
        if self.crop is None:
            return "predicted whole"
        strides = [math.ceil(crop * self.stride_rate) for crop in self.crop]
        small = "smaller images padded with the mean" if self.pad else "smaller images not padded"
        return (
            f"in windows of {self.crop[0]}x{self.crop[1]} (height x width), {strides[0]} rows and {strides[1]} columns "
            f"apart, the last ones moved inside; {small}"
        )

    def _average_text(self) -> str:
        if self.plain:
            return "the class of the greatest logit, bilinearly upsampled"
        over = [name for name, several in (("scales", len(self.scales) > 1), ("mirror images", self.flip)) if several]
        mean = f"; probabilities averaged over {' and '.join(over)}" if over else ""
        if self.crop is None:
            steps = "the image's" if self.average == "probabilities" else "the scaled image's, then the image's"
            return f"logits resized to {steps} size, then softmax{mean}"
        if self.average == "logits":
            return f"logits averaged where windows overlap, resized to the image's size, then softmax{mean}"
        return f"softmax in each window, averaged where windows overlap, then resized to the image's size{mean}"


def absent_text(absent: str) -> str:
    """The rule for absent classes in words."""
    rules = {
        "skip": "do not count in means",
        "zero": "count as 0 in means",
        "one": "count as 1 in means",
        "nan": "leave means undefined",
    }
    return f"classes without a score {rules[absent]}"


def _check(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
