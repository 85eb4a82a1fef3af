"""Pictures of files, small enough to stand in a page."""

import base64
import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

WIDEST = 960  # pixels
QUALITY = 85  # of JPEG


def data_uri(path: Path) -> str:
    """The picture of a file as the address of an ``<img>``: at most ``WIDEST`` pixels wide and high.

    Pictures of at most 256 colours, such as label maps, stay as they are but for their size; others become JPEG.

    Raises:
        ValueError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be shown: {error}") from None
    flat = picture.getcolors(256) is not None
    picture.thumbnail((WIDEST, WIDEST), Image.Resampling.NEAREST if flat else Image.Resampling.BICUBIC)
    content = io.BytesIO()
    if flat:
        picture.quantize(256, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    else:
        picture.save(content, "JPEG", quality=QUALITY)
    kind = "png" if flat else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
