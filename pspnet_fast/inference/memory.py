"""How much memory a prediction will take, and the batch that fits into a given amount."""

import ctypes
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pspnet_fast.files import megabytes
from pspnet_fast.inference.sliding import BAND_BYTES, Segmenter, band_rows
from pspnet_fast.optimization import Optimized

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PROBE = 512  # pixels a side, at most, of the image by which whole images are measured
_MARGIN = 1.15  # of what the model takes: convolutions choose scratch by batch size


def parse_bytes(text: str) -> int:
    """A number of bytes such as 4G, 500M or 4096; the units are powers of 1000.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"must be a size such as 4G or 500M, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class Cost:
    """Bytes that a model takes for one window, or one pixel of a whole image.

    Attributes:
        forward: at its peak, its result included.
        logits: of the result, in float32 at least.
        pixels: of the window that was measured.
    """

    forward: int
    logits: int
    pixels: int


@torch.inference_mode()
def measure(segmenter: Segmenter, height: int, width: int) -> Cost:
    """Run the model on one window, or on an image of at most 512x512, and see what it takes.

    On a GPU by torch's own count, on a CPU by the growth of the process, so that scratch of libraries counts.

    Raises:
        ValueError: on a CPU where the system does not tell the peak of a process (Linux does).
    """
    height, width = segmenter.protocol.crop or (min(height, _PROBE), min(width, _PROBE))
    window = torch.zeros(1, 3, height, width)
    # loads code, and packs the weights of an optimized model, which it keeps
    segmenter._run(window if isinstance(segmenter.model, Optimized) else torch.zeros(1, 3, 32, 32))
    device = segmenter.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        logits = segmenter._run(window)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        _reset_peak()
        before = _status("VmRSS")
        logits = segmenter._run(window)
        peak = _status("VmHWM")
    wide = max(logits.element_size(), 4) * logits.numel()
    return Cost(max(peak - before, wide), wide, height * width)


@dataclass(frozen=True)
class Plan:
    """What predicting images of one size takes, in bytes, beyond what the process has already.

    Attributes:
        segmenter: with the batch and the place of the maps that fit.
        device_bytes, host_bytes: on the model's device, and where that is no CPU, on the host.
    """

    segmenter: Segmenter
    device_bytes: int
    host_bytes: int


def fit(segmenter: Segmenter, cost: Cost, images: int, height: int, width: int, budget: int | None) -> Plan:
    """Choose the batch, and on a GPU where maps lie, so that all fits into ``budget``.

    Args:
        segmenter: its ``batch`` is the most that is chosen.
        images, height, width: of a call.
        budget: bytes, of the whole process on a CPU, of all that torch has on a GPU; None only estimates.

    Raises:
        ValueError: even one window at a time does not fit; the message says what is needed.
    """
    one = _forward(segmenter, cost, height, width)
    maps, common = _maps(segmenter, cost, images, height, width), _common(segmenter, images, height, width)
    gpu = segmenter.device.type == "cuda"
    held = torch.cuda.memory_allocated(segmenter.device) if gpu else _resident()
    free = None if budget is None else budget - held
    fixed = maps if gpu else maps + common
    host = segmenter.host
    if gpu and free is not None and not host and fixed + one > free:
        host = True
    if gpu and host:
        fixed = 0
    if free is not None and fixed + one > free:
        needed, forward = megabytes(int(held + fixed + one)), megabytes(int(one))
        part, less = ("window", "smaller windows") if segmenter.protocol.crop else ("whole image", "windows (a crop)")
        less += " and fewer images at a time" if images > 1 else ""
        raise ValueError(
            f"an image of {width}x{height} pixels needs {needed}, of which {forward} for one {part}, but may have "
            f"{megabytes(held + free)}; {less} take less"
        )
    batch = segmenter.batch if free is None else max(min(segmenter.batch, int((free - fixed) // one)), 1)
    chosen = replace(segmenter, batch=batch, host=host)
    at_once = batch if segmenter.protocol.crop else min(batch, images)
    return Plan(chosen, int(fixed + at_once * one), int(common + (maps if host else 0)) if gpu else 0)


def fit_what_is_free(segmenter: Segmenter, cost: Cost, images: int, height: int, width: int) -> Segmenter:
    """The same with the batch that fits into the memory that this machine has left.

    For a CPU: where Linux has no memory left it ends a process, with nothing that could be caught.

    Raises:
        MemoryError: even one window at a time does not fit; the message says what is needed.
    """
    free = available()
    if free is None:
        return segmenter
    try:
        return fit(segmenter, cost, images, height, width, _resident() + free).segmenter
    except ValueError as error:
        raise MemoryError(str(error)) from None


def available() -> int | None:
    """Bytes that Linux, or the limit of a container, still gives without swapping; None on other systems."""
    try:
        free = _kilobytes(Path("/proc/meminfo"))["MemAvailable"]
    except (OSError, KeyError):
        return None
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # no container; no limit is "max"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, limit - used + int(cached))
    return max(free, 0)


def _forward(segmenter: Segmenter, cost: Cost, height: int, width: int) -> float:
    """Of one window, or of one image at its largest scale."""
    if segmenter.protocol.crop is not None:
        return _MARGIN * cost.forward
    sizes = [segmenter.protocol.scaled_size(height, width, scale) for scale in segmenter.protocol.scales]
    return _MARGIN * cost.forward * max(max(h * w for h, w in sizes) / cost.pixels, 1)


def _maps(segmenter: Segmenter, cost: Cost, images: int, height: int, width: int) -> float:
    """Of maps of K classes: those of every scale and mirrored image, and the band where they are added up."""
    protocol, element = segmenter.protocol, segmenter._dtype.itemsize
    pixel = images * segmenter.classes * element
    if protocol.plain:
        return 0.0
    rows = min(band_rows(pixel * width), height)
    total = 5.0 * max(rows * pixel * width, BAND_BYTES / 8)  # the band, and resizing into it
    for scale in protocol.scales:
        h, w = protocol.scaled_size(height, width, scale)
        mirrored = 2 if protocol.flip and (protocol.crop is None or protocol.average == "logits") else 1
        if protocol.crop is None:
            total += mirrored * images * cost.logits * max(h * w / cost.pixels, 1)
            continue
        h, w = max(h, protocol.crop[0] * protocol.pad), max(w, protocol.crop[1] * protocol.pad)
        strip = min(protocol.crop[0], h) + rows * h / height + 2
        total += mirrored * pixel * w * strip
    if protocol.crop is not None:  # the next strip of the widest map beside it, and a window's logits in full
        widest = max(max(protocol.scaled_size(height, width, scale)[1] for scale in protocol.scales), protocol.crop[1])
        total += pixel * widest * protocol.crop[0]
        _, lefts = protocol.window_starts(protocol.crop[0], widest)
        total += 2 * images * len(lefts) * cost.logits * (2 if protocol.flip else 1)
        total += pixel * protocol.crop[0] * protocol.crop[1] if protocol.average == "logits" else 0
    return total


def _common(segmenter: Segmenter, images: int, height: int, width: int) -> float:
    """On the host: images scaled and cut into windows, and results."""
    protocol = segmenter.protocol
    total = 10.0 * images * height * width  # classes and confidence, each twice while bands are joined
    largest = 0.0
    for scale in protocol.scales:
        h, w = protocol.scaled_size(height, width, scale)
        total += images * 3 * h * w * protocol.rounded
        if protocol.crop is not None:
            h, w = min(protocol.crop[0], h), max(w, protocol.crop[1])
        copies = 3 if protocol.crop is None else 6  # the rows, their windows, which overlap, and those mirrored
        largest = max(largest, copies * images * 3 * h * w * 4.0)
    return total + largest


def _reset_peak() -> None:
    with suppress(OSError, AttributeError):  # glibc's: what is free in the process must not serve the model unseen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        raise ValueError("a bound on memory needs Linux, or a GPU: here a process's peak cannot be measured") from None


def peak_memory(device: torch.device) -> int | None:
    """Most bytes so far: on a GPU of what torch had there, else of the process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except OSError:
        return None


def _resident() -> int:
    try:
        return _status("VmRSS")
    except OSError:
        return 0


def _status(field: str) -> int:
    """A size that Linux keeps of this process. (getrusage's would be that of its parent, if greater.)"""
    return _kilobytes(Path("/proc/self/status"))[field]


def _kilobytes(path: Path) -> dict[str, int]:
    """The sizes in a file of Linux' /proc, in bytes."""
    return {
        name: int(size) * 1024 for name, size in re.findall(r"^(\w+):[ \t]*(\d+) kB$", path.read_text(), re.MULTILINE)
    }
