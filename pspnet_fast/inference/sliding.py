"""Prediction of images under a protocol, a band of rows at a time, so that no map of K classes has the image's size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast import ops
from pspnet_fast.data.images import Image, to_float
from pspnet_fast.inference.protocol import Protocol
from pspnet_fast.inference.resample import Places, ScaledImages, opencv_places, torch_places

BAND_BYTES = 32e6  # of the probabilities that are added up at a time
_ROWS = (8, 256)  # fewest and most rows of them


@dataclass(frozen=True)
class Segmenter:
    """A model and all that predicting images with it under a protocol needs.

    Attributes:
        model: in evaluation mode, on its device; returns {"out": (N, K, h, w)} and tells ``align_corners``.
        classes: K.
        mean, std: per channel, for images in 0..1.
        protocol: sizes, windows and averages.
        batch: windows, or whole images, that the model gets at a time, at most.
        host: keep the maps of overlapping windows in host memory, not on the model's device.
        autocast: dtype to run the model in, None its own.
        channels_last: bring the model's input to that layout.
    """

    model: nn.Module
    classes: int
    mean: Sequence[float]
    std: Sequence[float]
    protocol: Protocol = field(default_factory=Protocol)
    batch: int = 8
    host: bool = False
    autocast: torch.dtype | None = None
    channels_last: bool = False

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], confidence: bool = False) -> tuple[Tensor, Tensor | None]:
        """Predict the class of every pixel; of equal probabilities the lowest class wins.

        Args:
            images: of one size, each (H, W, 3), uint8, uint16, or float32 in 0..255.
            confidence: whether to return the class's probability as well.

        Returns:
            classes (N, H, W) uint8, or int32 for more than 256 classes, and the confidence (N, H, W), float32, float64
            of a float64 model, or None; both on the model's device, or on the CPU with ``host``.

        Raises:
            ValueError: there is no image, or they have different sizes.
        """
        return self.maps(images, confidence)[:2]

    @torch.inference_mode()
    def maps(
        self, images: Sequence[Image], confidence: bool = False, probabilities: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same, and as third the probabilities (N, K, H, W) of all classes, or None: of one run of the model."""
        sizes = {image.shape for image in images}
        if len(sizes) != 1 or len(next(iter(sizes))) != 3:
            raise ValueError(f"images must be one or more of one size (H, W, 3), got {sorted(sizes)}")
        height, width = images[0].shape[:2]
        shape = (len(images), height, width)
        # Of their final size from the start: parts kept between the bands' large maps would scatter free memory.
        every = self._new(shape[0], self.classes, height, width) if probabilities else None
        if self.protocol.plain:
            logits, size = self._run(self._normalised(images)), (height, width)
            settings: Any = {"align_corners": bool(self.model.align_corners), "return_confidence": confidence}
            found: Any = ops.upsample_argmax(logits, size, **settings)
            classes, certain = found if confidence else (found, None)
            if every is not None:
                for first, band in self._sums([self._layer(self._whole(logits, size), height)], every.shape):
                    every[:, :, first : first + band.size(2)] = band
            return classes, certain, every
        kind = torch.uint8 if self.classes <= 256 else torch.int32
        classes = torch.empty(shape, dtype=kind, device=self._map_device)
        certain = self._new(*shape) if confidence else None
        for first, band in self.bands(images):
            rows = slice(first, first + band.size(2))
            classes[:, rows] = ops.upsample_argmax(band, _extent(band), align_corners=True)
            if certain is not None:
                torch.amax(band, 1, out=certain[:, rows])
            if every is not None:
                every[:, :, rows] = band
        return classes, certain, every

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._map_device)

    @torch.inference_mode()
    def bands(self, images: Sequence[Image]) -> Iterator[tuple[int, Tensor]]:
        """Yield the class probabilities of ``images`` from top to bottom.

        Yields:
            the band's first row and its probabilities (N, K, rows, W), float32, float64 of a float64 model.
        """
        height, width = images[0].shape[:2]
        yield from self._sums(self._layers(images), (len(images), self.classes, height, width))

    def _sums(self, layers: list["_Layer"], shape: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Bands of the layers' mean, of maps of a shape (N, K, H, W)."""
        n, classes, height, width = shape
        rows = band_rows(n * classes * width * self._dtype.itemsize)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            total = torch.zeros((n, classes, last - first, width), dtype=self._dtype, device=self._map_device)
            for layer in layers:
                layer.add(total, first, last, 1 / len(layers))
            yield first, total

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32

    @property
    def _map_device(self) -> torch.device:
        return torch.device("cpu") if self.host else self.device

    def _layers(self, images: Sequence[Image]) -> list["_Layer"]:
        """What is averaged: a layer each scale, and each mirrored image that is predicted on its own."""
        protocol, (height, width) = self.protocol, images[0].shape[:2]
        windows_mirrored = protocol.crop is not None and protocol.average == "probabilities"
        layers = []
        for scale in protocol.scales:
            size = protocol.scaled_size(height, width, scale)
            padding = protocol.padding(*size)
            scaled = ScaledImages(images, size, padding, protocol.rounded, self.mean, self.std)
            for mirrored in (False, True) if protocol.flip and not windows_mirrored else (False,):
                source = self._source(scaled, size, padding, mirrored)
                if windows_mirrored:
                    layers.append(_Layer(source, (opencv_places(size[0], height), opencv_places(size[1], width))))
                else:
                    layers.append(self._layer(source, height, mirrored))
        return layers

    def _layer(self, source: "_Source", height: int, mirrored: bool = False) -> "_Layer":
        """Of logits, for images of this height."""
        aligned = bool(self.model.align_corners)
        return _Layer(source, (torch_places(source.height, height, aligned, self._dtype), None), aligned, mirrored)

    def _source(
        self, scaled: ScaledImages, size: tuple[int, int], padding: tuple[int, int, int, int], mirrored: bool
    ) -> "_Source":
        protocol = self.protocol
        if protocol.crop is not None:
            return WindowMaps(self, scaled, size, padding, mirrored)
        pixels = scaled.rows(0, size[0])
        return self._whole(self._run(pixels.flip(3) if mirrored else pixels), size)

    def _whole(self, logits: Tensor, size: tuple[int, int]) -> "_WholeMaps":
        """Logits of whole images of this size."""
        direct = self.protocol.average == "probabilities"
        logits = logits.to(self._map_device, self._dtype)
        return _WholeMaps(logits, None if direct else size, bool(self.model.align_corners))

    def _normalised(self, images: Sequence[Image]) -> Tensor:
        """(N, 3, H, W) float32: :func:`pspnet_fast.data.transforms.normalise` to the bit, on the model's device."""
        pixels = [image if image.dtype == np.uint8 else to_float(image) for image in images]
        tensors = [torch.from_numpy(np.require(image, requirements=("C", "W"))) for image in pixels]
        planes = torch.stack(tensors).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        result = torch.empty(planes.shape, device=self.device, memory_format=layout).copy_(planes)
        shift, scale = (
            torch.tensor(values, dtype=torch.float32, device=self.device).mul_(255).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        return result.sub_(shift).div_(scale)

    def _run(self, input: Tensor) -> Tensor:
        """Logits (N, K, h, w) of normalised images (N, 3, H, W), ``batch`` at a time."""
        parameter = next(self.model.parameters())
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        parts = []
        for part in input.split(self.batch):
            part = part.to(parameter.device, parameter.dtype, non_blocking=True, memory_format=layout)
            with torch.autocast(parameter.device.type, self.autocast, enabled=self.autocast is not None):
                parts.append(self.model(part)["out"])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def band_rows(row_bytes: float) -> int:
    """Rows of a band of which a row of all images and classes takes so many bytes."""
    return int(min(max(BAND_BYTES // row_bytes, _ROWS[0]), _ROWS[1]))


class _Source(Interface):
    """Maps (N, K, height, W') of which a band of rows can be had; bands are asked for from top to bottom."""

    height: int

    def rows(self, first: int, last: int) -> Tensor: ...


@dataclass(frozen=True)
class _Layer:
    """A source and how it comes to the size of the image: probabilities by ``places``, logits by the operator."""

    source: _Source
    places: tuple[Places, Places | None]
    align_corners: bool = False
    mirrored: bool = False

    def add(self, total: Tensor, first: int, last: int, weight: float) -> None:
        """Add the rows ``first`` to ``last`` to ``total`` (N, K, last - first, W)."""
        rows, columns = self.places[0].part(first, last), self.places[1]
        reach = rows.reach
        values = rows.interpolate(self.source.rows(*reach), 2, reach[0])
        if columns is not None:
            total.add_(columns.interpolate(values, 3), alpha=weight)
        else:
            ops.upsample_softmax_accumulate_(
                total, values, align_corners=self.align_corners, mirrored=self.mirrored, weight=weight
            )


class _WholeMaps:
    """The logits of whole images, as they are or interpolated to the size of the scaled image."""

    def __init__(self, logits: Tensor, size: tuple[int, int] | None, align_corners: bool) -> None:
        self._logits = logits
        self._places = None
        self.height = logits.size(2)
        if size is not None and size != _extent(logits):
            self.height = size[0]
            self._places = [
                torch_places(source, target, align_corners, logits.dtype)
                for source, target in zip(_extent(logits), size, strict=True)
            ]

    def rows(self, first: int, last: int) -> Tensor:
        if self._places is None:
            return self._logits[:, :, first:last]
        rows, columns = self._places
        rows = rows.part(first, last)
        top, bottom = rows.reach
        return columns.interpolate(rows.interpolate(self._logits[:, :, top:bottom], 2, top), 3)


class WindowMaps:
    """Averages over the overlapping windows of scaled images, a row of windows at a time.

    Only the rows that windows still to come change, and those not yet asked for, are kept.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        images: ScaledImages,
        size: tuple[int, int],
        padding: tuple[int, int, int, int],
        mirrored: bool,
    ) -> None:
        protocol = segmenter.protocol
        assert protocol.crop is not None
        self.height, self._width = size
        self._above, _, self._left, _ = padding
        self._segmenter, self._images, self._mirrored = segmenter, images, mirrored
        self._tops, self._lefts = protocol.window_starts(*images.size)
        self._window = (min(protocol.crop[0], images.size[0]), min(protocol.crop[1], images.size[1]))
        self._counts = [
            _coverage(starts, window, extent)
            for starts, window, extent in zip((self._tops, self._lefts), self._window, images.size, strict=True)
        ]
        self._sums: Tensor | None = None  # (N, K, rows, W) from the row ``_first`` on
        self._first = self._next = 0  # window row

    def rows(self, first: int, last: int) -> Tensor:
        """(N, K, last - first, W') averages; ``first`` never falls from call to call."""
        first, last = first + self._above, last + self._above
        while self._next < len(self._tops) and last > self._tops[self._next]:
            self._advance(first)
        assert self._sums is not None
        columns = slice(self._left, self._left + self._width)
        sums = self._sums[:, :, first - self._first : last - self._first, columns]
        counts = self._counts[0][first:last, None] * self._counts[1][columns]
        return sums / counts.to(sums.device, sums.dtype)

    def _advance(self, keep: int) -> None:
        """Predict the next row of windows; rows above ``keep`` are needed no more."""
        top = self._tops[self._next]
        keep = min(keep, top)
        self._make_room(keep, top + self._window[0])
        self._next += 1
        height, width = self._window
        pixels = self._images.rows(top, top + height)
        if self._mirrored:
            pixels = pixels.flip(3)
        windows = torch.cat([pixels[..., left : left + width] for left in self._lefts])
        protocol, images = self._segmenter.protocol, len(pixels)
        for mirrored in (False, True) if protocol.flip and protocol.average == "probabilities" else (False,):
            logits = self._segmenter._run(windows.flip(3) if mirrored else windows)
            for left, part in zip(self._lefts, logits.split(images), strict=True):
                self._add(part, top - keep, left, mirrored)

    def _make_room(self, first: int, last: int) -> None:
        """Keep the sums from row ``first`` on, and have zeros from there to row ``last``."""
        segmenter, old = self._segmenter, self._sums
        shape = (len(self._images), segmenter.classes, last - first, self._images.size[1])
        sums = torch.zeros(shape, dtype=segmenter._dtype, device=segmenter._map_device)
        if old is not None:
            kept = old[:, :, first - self._first :]
            sums[:, :, : kept.size(2)] = kept
        self._sums, self._first = sums, first

    def _add(self, logits: Tensor, top: int, left: int, mirrored: bool) -> None:
        segmenter, aligned = self._segmenter, bool(self._segmenter.model.align_corners)
        assert self._sums is not None
        logits = logits.to(self._sums.device)
        height, width = self._window
        if segmenter.protocol.average == "probabilities":
            ops.upsample_softmax_accumulate_(
                self._sums,
                logits,
                align_corners=aligned,
                top=top,
                left=left,
                size=self._window,
                mirrored=mirrored,
                weight=0.5 if segmenter.protocol.flip else 1.0,
            )
        else:
            upsampled = F.interpolate(logits.to(self._sums.dtype), self._window, mode="bilinear", align_corners=aligned)
            self._sums[:, :, top : top + height, left : left + width] += upsampled


def _coverage(starts: Sequence[int], window: int, extent: int) -> Tensor:
    """(extent,) int64: how many windows cover each place of an axis."""
    count = torch.zeros(extent, dtype=torch.int64)
    for start in starts:
        count[start : start + window] += 1
    return count


def _extent(maps: Tensor) -> tuple[int, int]:
    return maps.size(2), maps.size(3)
