"""Where the time of training goes."""

import time

import torch

PARTS = ("data", "forward", "backward", "optimizer")


class Times:
    """Seconds of each part of the iterations; on a GPU those of the device, so that no part waits for another.

    There "data" is the time for which the GPU has nothing to do because the next batch is not there.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, object, object]] = []
        self._last = self._now()

    def start(self) -> None:
        """What was before belongs to no part."""
        self._last = self._now()

    def mark(self, part: str) -> None:
        """What was since the last mark belongs to ``part``."""
        now = self._now()
        self._spans.append((part, self._last, now))
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, begin, end in self._spans:
            seconds[part] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin  # type: ignore
        self._spans.clear()
        return seconds

    def _now(self) -> object:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
