"""Frames of videos, read and written by OpenCV's FFmpeg. A video that is written has no sound."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from pspnet_fast.data import UnreadableError

USUAL_RATE = 25.0  # frames a second, for a video that does not tell its own


class VideoReader:
    """The frames of a video, RGB uint8 (H, W, 3), turned as its file says.

    Attributes:
        rate: frames a second.
        frames: how many the file tells of; 0 if it does not. Those that can be read may be fewer.

    Raises:
        UnreadableError: the file is no video that OpenCV can read.
    """

    def __init__(self, path: Path) -> None:
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not self._capture.isOpened():
            raise UnreadableError(f"{path}: is not a video that OpenCV can read, or not whole")
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or USUAL_RATE
        self.frames = max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        while True:
            there, frame = self._capture.read()
            if not there:
                return
            yield np.ascontiguousarray(frame[..., ::-1])


class VideoWriter:
    """A video that takes the place of ``path`` once the context has ended well; until then ``path`` stays as it was.

    A .mkv holds grey frames, uint8 (H, W), exactly (FFV1), a .mp4 RGB frames (H, W, 3) as MPEG-4, which is not exact.

    Raises:
        OSError: it cannot be written, or not all of its frames; it names ``path``.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self._path, self._rate = path, rate
        self._partial = path.with_name(f"{path.stem}.tmp{path.suffix}")  # OpenCV takes the kind from the suffix
        self._writer: cv2.VideoWriter | None = None
        self._frames = 0

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Add a frame; all have one shape."""
        if self._writer is None:
            code = cv2.VideoWriter.fourcc(*("FFV1" if self._path.suffix == ".mkv" else "mp4v"))
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self._partial), cv2.CAP_FFMPEG, code, self._rate, size, frame.ndim == 3)
            if not self._writer.isOpened():
                raise OSError(errno.EIO, "cannot be written: OpenCV opens no video there", str(self._path))
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]) if frame.ndim == 3 else frame)
        self._frames += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self._writer is None:
                return
            self._writer.release()
            if kind is None:
                self._check()
                os.replace(self._partial, self._path)
        finally:
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)

    def _check(self) -> None:
        """OpenCV tells nothing of what it could not write."""
        written = 0
        with suppress(UnreadableError):
            written = VideoReader(self._partial).frames
        if written != self._frames:
            reason = f"cannot be written: {written} of {self._frames} frames are there; is the disk full?"
            raise OSError(errno.EIO, reason, str(self._path))
