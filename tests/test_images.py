"""Photographs of every kind that people have: what is read of each, and what is refused, with a sentence."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pspnet_fast.data import DataError
from pspnet_fast.data.images import read_image

HEIGHT, WIDTH = 24, 40
# Red grows to the right, green downwards: no two turns of it are alike.
PICTURE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
PICTURE[..., 0] = np.arange(WIDTH) * 6
PICTURE[..., 1] = np.arange(HEIGHT)[:, None] * 10
PICTURE[..., 2] = 50

ORIENTATION = 0x112
# EXIF orientation -> what a viewer shows of the stored pixels.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def encoded(picture: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opencv(picture: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, picture[..., ::-1] if picture.ndim == 3 else picture)[1].tobytes()


def read(folder: Path, content: bytes, **options: bool) -> np.ndarray:
    path = folder / "photo"  # what a file is stands in its content
    path.write_bytes(content)
    return read_image(path, **options)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff"])
def test_ordinary_images_are_as_opencv_decodes_them(tmp_path: Path, suffix: str) -> None:
    content = opencv(PICTURE, suffix)
    image = read(tmp_path, content)
    assert image.dtype == np.float32
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(image, decoded)
    if suffix != ".jpg":
        np.testing.assert_array_equal(image, PICTURE)


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation_is_what_viewers_show(tmp_path: Path, kind: str, orientation: int) -> None:
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[kind]
    content = encoded(PICTURE, kind, exif=exif(orientation), **options)
    stored = read(tmp_path, content, oriented=False)
    np.testing.assert_allclose(stored, PICTURE, atol=8 if kind == "JPEG" else 0)
    np.testing.assert_array_equal(read(tmp_path, content), SHOWN[orientation](stored))


def test_grey_palette_and_one_bit_become_rgb(tmp_path: Path) -> None:
    grey = PICTURE[..., 0]
    np.testing.assert_array_equal(read(tmp_path, opencv(grey, ".png")), np.stack([grey] * 3, -1))
    palette = Image.fromarray(grey // 6)
    palette.putpalette([value for index in range(40) for value in (index, 2 * index, 3 * index)])
    expected = np.stack([grey // 6, 2 * (grey // 6), 3 * (grey // 6)], -1)
    np.testing.assert_array_equal(read(tmp_path, encoded(palette, "PNG")), expected)
    bits = grey > 100
    np.testing.assert_array_equal(read(tmp_path, encoded(Image.fromarray(bits), "PNG"))[..., 1], 255 * bits)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped(tmp_path: Path, alpha: int) -> None:
    content = encoded(np.dstack([PICTURE, np.full((HEIGHT, WIDTH), alpha, np.uint8)]), "PNG")
    np.testing.assert_array_equal(read(tmp_path, content), PICTURE)
    grey = np.dstack([PICTURE[..., 0], np.full((HEIGHT, WIDTH), alpha, np.uint8)])
    np.testing.assert_array_equal(read(tmp_path, encoded(grey, "PNG"))[..., 2], PICTURE[..., 0])


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = read(tmp_path, encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(image, PICTURE, atol=12)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bits_are_scaled_to_255_without_loss(tmp_path: Path, suffix: str) -> None:
    deep = PICTURE.astype(np.uint16) * 257
    np.testing.assert_array_equal(read(tmp_path, opencv(deep, suffix)), PICTURE)
    deep = np.full((2, 3), 1000, np.uint16)
    np.testing.assert_allclose(read(tmp_path, opencv(deep, suffix)), 1000 / 257)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, kind: str) -> None:
    frames = [np.full((HEIGHT, WIDTH, 3), value, np.uint8) for value in (0, 255)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=[Image.fromarray(frames[1])], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    np.testing.assert_array_equal(read(tmp_path, content), frames[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, dtype: type, channels: int) -> None:
    picture = PICTURE.astype(dtype) if channels == 3 else PICTURE[..., 0].astype(dtype)
    with pytest.raises(DataError, match=rf"photo: has pixels of {np.dtype(dtype)}, .* save it with 8 or 16 bits"):
        read(tmp_path, opencv(picture, ".tiff"))


@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, kept: float, capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(256, size=(200, 300, 3)).astype(np.uint8)
    content = encoded(noise, kind.split()[-1], **({"progressive": True} if "progressive" in kind else {}))
    assert read(tmp_path, content).shape == (200, 300, 3)
    with pytest.raises(DataError, match="photo: is not an image that OpenCV can decode, or not whole"):
        read(tmp_path, content[: int(kept * len(content))])
    # The error says it all; what libpng itself writes cannot be kept back.
    assert [line for line in capfd.readouterr().err.splitlines() if not line.startswith("libpng")] == []


def test_files_that_are_no_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="photo: is empty"):
        read(tmp_path, b"")
    with pytest.raises(DataError, match="photo: is not an image that OpenCV can decode"):
        read(tmp_path, b"no image")
    with pytest.raises(DataError, match=r"gone.png: cannot be read \(No such file or directory\)"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        read_image(tmp_path)
    assert capfd.readouterr() == ("", "")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_image_beyond_opencvs_limit(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"photo: has more pixels than OpenCV reads"):
        read(tmp_path, content)


def test_path_with_other_characters(tmp_path: Path) -> None:
    path = tmp_path / "straße 1.png"
    path.write_bytes(opencv(np.full((2, 2, 3), (3, 2, 1), np.uint8), ".png"))
    assert read_image(path)[0, 0].tolist() == [3, 2, 1]
