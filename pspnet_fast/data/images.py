"""Reading photographs."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pspnet_fast.data import DataError, UnreadableError

Image = NDArray[Any]  # (H, W, 3): float32 in 0..255, or uint8 or uint16 as a file holds it

SUFFIXES = {".bmp", ".dib", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff"}
SUFFIXES |= {".webp"}
"""Files of a folder that count as images."""

_FORMATS = "JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF and JPEG 2000"


def read_image(path: Path, oriented: bool = True) -> Image:
    """Read an image as float32 RGB (H, W, 3), 0..255; see :func:`decode_image`."""
    return to_float(decode_image(path, oriented))


def to_float(pixels: Image) -> Image:
    """Pixels of 8 or 16 bits as float32 in 0..255; float32 ones as they are."""
    image = pixels.astype(np.float32, copy=False)
    return image / 257 if pixels.dtype == np.uint16 else image  # 65535 = 257 * 255


def decode_image(path: Path, oriented: bool = True) -> Image:
    """Read an image as RGB (H, W, 3), uint8 or uint16 as the file is.

    Grey, palette and CMYK images become RGB, an alpha channel is dropped, and of several
    frames the first is read.

    Args:
        oriented: turn the image as its EXIF orientation says, as viewers show it.

    Raises:
        UnreadableError: the file is missing, not whole or no image that OpenCV can read.
        DataError: it is not of 8 or 16 bits, or too large.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    content = read_content(path)
    pixels = _decode(path, content, flags if oriented else flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        pixels = _decode(path, content, cv2.IMREAD_UNCHANGED)  # only to say why
    if pixels is None:
        raise UnreadableError(f"{path}: is not an image that OpenCV can decode, or not whole; it reads {_FORMATS}")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{path}: has pixels of {pixels.dtype}, whose black and white are unknown; save it with 8 or 16 bits"
        )
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def unused_bits(image: Image) -> str | None:
    """What is odd about an image of 16 bits whose values fill only 10, 12 or 14 of them, as those of cameras do."""
    most = round(257 * float(image.max()))
    bits = next((bits for bits in (10, 12, 14) if most < 2**bits), None)
    if bits is None or not (image % 1).any():  # where all are whole the file has 8 bits
        return None
    return (
        f"has 16 bits and no value above {most}, so that it is dark; if its white is {2**bits - 1}, scale it to 65535"
    )


def read_content(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        UnreadableError: it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from None
    if not content:
        raise UnreadableError(f"{path}: is empty")
    return content


def _decode(path: Path, content: bytes, flags: int) -> NDArray[Any] | None:
    # OpenCV also tells on stderr what it does not know or like in a file; a user shall read one message, ours.
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in error.err:
            raise DataError(f"{path}: has more pixels than OpenCV reads (2**30, or 2**20 a side); cut it up") from None
        raise UnreadableError(f"{path}: OpenCV cannot decode it ({' '.join(error.err.split())})") from None
    finally:
        cv2.utils.logging.setLogLevel(level)
