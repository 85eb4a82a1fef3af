"""Label files of every kind: the values that are read of each, what they mean, and what is refused, with a sentence."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pspnet_fast.data import DataError
from pspnet_fast.data.conventions import CONVENTIONS
from pspnet_fast.data.labels import LabelReader

VALUES = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [255, 0, 0, 1]], np.uint8)
COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
GREY, PALETTE = 0, 3  # colour types of PNG


def read(folder: Path, content: bytes, reader: LabelReader | None = None) -> list[list[int]]:
    path = folder / "label"
    path.write_bytes(content)
    label = (reader or LabelReader(4))(path)
    assert label.dtype == np.uint8
    return label.tolist()


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_palette(values: np.ndarray, colors: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(values)
    full = [*colors, *[(9, 9, 9)] * (256 - len(colors))]  # of a shorter palette Pillow would cut the values
    image.putpalette([channel for color in full for channel in color])
    return image


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def packed_png(values: np.ndarray, bits: int, kind: int) -> bytes:
    """A PNG with several values in a byte, written by hand: no library writes grey ones."""
    height, width = values.shape
    digits = (values[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8).reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in digits)
    palette = chunk(b"PLTE", bytes(range(200, 200 + 3 * 2**bits))) if kind == PALETTE else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_grey_files_hold_values(tmp_path: Path, kind: str) -> None:
    assert read(tmp_path, encoded(VALUES, kind)) == VALUES.tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_palette_files_hold_their_indices(tmp_path: Path, kind: str) -> None:
    content = encoded(with_palette(VALUES, COLORS), kind)
    assert Image.open(io.BytesIO(content)).mode == "P"
    assert read(tmp_path, content) == VALUES.tolist()


def test_voc(tmp_path: Path) -> None:
    values = np.arange(21, dtype=np.uint8).repeat(3).reshape(7, 9)
    values[0, 0] = 255
    colors = [(value, 0, 255 - value) for value in range(256)]
    content = encoded(with_palette(values, colors), transparency=3)
    assert read(tmp_path, content, LabelReader(21, "voc")) == values.tolist()


@pytest.mark.parametrize("kind", [GREY, PALETTE])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_values_of_few_bits_are_not_spread(tmp_path: Path, bits: int, kind: int) -> None:
    values = np.arange(5 * 2**bits).reshape(5, -1) % 2**bits
    assert read(tmp_path, packed_png(values, bits, kind), LabelReader(2**bits)) == values.tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit_masks_are_0_and_1(tmp_path: Path, kind: str) -> None:
    mask = VALUES == 1
    content = encoded(Image.fromarray(mask), kind)
    assert Image.open(io.BytesIO(content)).mode == "1"
    assert read(tmp_path, content, LabelReader(2)) == mask.astype(int).tolist()


def test_16_bit_files_whose_values_are_classes(tmp_path: Path) -> None:
    for suffix in (".png", ".tiff"):
        content = cv2.imencode(suffix, VALUES.astype(np.uint16))[1].tobytes()
        assert read(tmp_path, content) == VALUES.tolist()
    deep = np.array([[26001, 7, 24000]], np.uint16)
    content = cv2.imencode(".png", deep)[1].tobytes()
    with pytest.raises(DataError, match=r"label: label values 7, 24000, 26001 \(3 pixels outside the classes\)"):
        read(tmp_path, content)
    assert read(tmp_path, content, LabelReader(4, remap={26001: 3, 24000: 2, "other": 255})) == [[3, 255, 2]]


@pytest.mark.parametrize("value", [-1, 70000])
def test_32_bit_values_that_no_label_has(tmp_path: Path, value: int) -> None:
    content = cv2.imencode(".tiff", np.array([[0, value]], np.int32))[1].tobytes()
    with pytest.raises(DataError, match=f"label value {value}; labels hold 0 to 65535"):
        read(tmp_path, content)
    assert read(tmp_path, cv2.imencode(".tiff", VALUES.astype(np.int32))[1].tobytes()) == VALUES.tolist()


def test_rgb_files_hold_the_colours_of_classes(tmp_path: Path) -> None:
    classes = VALUES[:2]
    picture = np.array(COLORS, np.uint8)[classes]
    reader = LabelReader(4, colors=COLORS)
    for content in (
        encoded(picture),
        encoded(picture, "WEBP", lossless=True),
        encoded(np.dstack([picture, np.full(classes.shape, 255, np.uint8)])),
    ):
        assert read(tmp_path, content, reader) == classes.tolist()
    with pytest.raises(DataError, match=r"label: a coloured label needs data.colors"):
        read(tmp_path, encoded(picture), LabelReader(4))


def test_unknown_colour_is_named_with_its_nearest_class(tmp_path: Path) -> None:
    picture = np.array(COLORS, np.uint8)[VALUES[:2]]
    picture[0, :2] = 120, 3, 0
    picture[1, 0] = 255, 255, 255
    with pytest.raises(DataError) as error:
        read(tmp_path, encoded(picture), LabelReader(4, colors=COLORS))
    assert str(error.value) == (
        f"{tmp_path / 'label'}: colour (120, 3, 0) in 2 pixels and 1 other colours in 1 is that of no class; "
        'the nearest is (128, 0, 0) of class 1; "data.remap={120 3 0: 255}" ignores a colour'
    )
    reader = LabelReader(4, remap={"120 3 0": 1, "255 255 255": 255}, colors=COLORS)
    assert read(tmp_path, encoded(picture), reader) == [[1, 1, 2, 3], [255, 2, 1, 0]]


def test_classes_of_one_colour_cannot_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"label: coloured labels cannot tell classes 0 and 2 apart: both are \(1, 2, 3\)"
    ):
        read(tmp_path, encoded(np.zeros((2, 2, 3), np.uint8)), LabelReader(3, colors=[(1, 2, 3), (0, 0, 0), (1, 2, 3)]))


def test_color_takes_the_palettes_colours(tmp_path: Path) -> None:
    content = encoded(with_palette(VALUES[:2], COLORS[::-1]))
    assert read(tmp_path, content, LabelReader(4, "color", colors=COLORS)) == (3 - VALUES[:2]).tolist()
    grey = encoded(np.array([[0, 255]], np.uint8))
    assert read(tmp_path, grey, LabelReader(2, "color", colors=[(255, 255, 255), (0, 0, 0)])) == [[1, 0]]


def test_grey_saved_as_rgb_is_not_taken_for_values(tmp_path: Path) -> None:
    for colors in (COLORS, None):
        with pytest.raises(DataError, match=r"its three channels are equal: if they are values, .* save them as one"):
            read(tmp_path, encoded(np.stack([VALUES] * 3, -1)), LabelReader(4, colors=colors))


def test_other_of_colours(tmp_path: Path) -> None:
    picture = np.array(COLORS, np.uint8)[VALUES[:2]]
    picture[0, 0] = 9, 9, 9
    reader = LabelReader(4, remap={"other": 255}, colors=COLORS)
    assert read(tmp_path, encoded(picture), reader) == [[255, 1, 2, 3], [3, 2, 1, 0]]


def test_alpha(tmp_path: Path) -> None:
    opaque, holes = np.full_like(VALUES, 255), np.where(VALUES == 1, 254, 255).astype(np.uint8)
    assert read(tmp_path, encoded(np.dstack([VALUES, opaque]))) == VALUES.tolist()
    with pytest.raises(DataError, match="label: is transparent in places"):
        read(tmp_path, encoded(np.dstack([VALUES, holes])))


def test_label_with_an_orientation_of_its_own(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x112] = 6
    assert read(tmp_path, encoded(with_palette(VALUES, COLORS), exif=tags)) == np.rot90(VALUES, -1).tolist()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("JPEG", {}, "a JPEG label: JPEG is lossy"),
        ("TIFF", {"compression": "jpeg"}, "a JPEG label: JPEG is lossy"),
        ("WEBP", {}, "a label in lossy WebP"),
        ("PPM", {}, "labels are read from PNG, TIFF, BMP, GIF, WEBP, not from PPM"),
        ("PNG", {"save_all": True, "append_images": [Image.fromarray(VALUES + 1)]}, "must be one image, .* holds 2"),
    ],
)
def test_files_that_cannot_be_labels(tmp_path: Path, kind: str, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"label: .*{message}"):
        read(tmp_path, encoded(VALUES, kind, **options))


def test_pixels_that_cannot_be_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label: a label must hold integers or RGB colours, got pixels of the kind 'F'"):
        read(tmp_path, cv2.imencode(".tiff", VALUES.astype(np.float32))[1].tobytes())
    deep = cv2.imencode(".png", np.zeros((2, 2, 3), np.uint16))[1].tobytes()
    with pytest.raises(DataError, match="label: a label of several channels must have 8 bits in each"):
        read(tmp_path, deep)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(4, size=(100, 80)).astype(np.uint8)
    content = encoded(noise, kind)
    assert read(tmp_path, content) == noise.tolist()
    with pytest.raises(DataError, match=r"label: is (damaged or not whole|not an image)") as error:
        read(tmp_path, content[: int(kept * len(content))])
    assert " at 0x" not in str(error.value)


def test_label_beyond_pillows_limit(tmp_path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, GREY, 0, 0, 0))
    with pytest.raises(DataError, match=r"label: has more pixels than Pillow reads \(178956970\)"):
        read(tmp_path, b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label: is empty"):
        read(tmp_path, b"")
    with pytest.raises(DataError, match="label: is not an image that Pillow can read; save labels as PNG"):
        read(tmp_path, b"no image")


def column(folder: Path, values: list[int], reader: LabelReader) -> list[int]:
    return read(folder, encoded(np.array([values], np.uint8)), reader)[0]


def test_conventions(tmp_path: Path) -> None:
    ignored = 255
    assert column(tmp_path, [0, 1, 149, 150], LabelReader(150, "ade20k")) == [ignored, 0, 148, 149]
    assert column(tmp_path, [0, 1, 4, 255], LabelReader(4, "from_one")) == [ignored, 0, 3, ignored]
    assert column(tmp_path, [0, 18, 255], LabelReader(19, "index")) == [0, 18, ignored]
    # The labels of the Cityscapes benchmark by id: road 7 is class 0, ..., bicycle 33 is class 18.
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
                 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
    expected = [train_ids.get(value, ignored) for value in range(34)]
    assert column(tmp_path, list(range(34)), LabelReader(19, "cityscapes")) == expected
    assert column(tmp_path, [0, 10, 11, 255], LabelReader(11, "camvid")) == [0, 10, ignored, ignored]
    # COCO-Stuff: person 1 is class 0, fire hydrant 11 is 10, stop sign 13 is 11, hair drier 89 is 78, wood 182 is 170.
    assert column(tmp_path, [0, 10, 12, 88, 181, 255], LabelReader(171, "cocostuff")) == [0, 10, 11, 78, 170, ignored]
    assert set(CONVENTIONS) == {
        "index", "from_one", "ade20k", "cityscapes", "voc", "camvid", "cocostuff", "color",
    }  # fmt: skip


def test_colours_of_camvid(tmp_path: Path) -> None:
    names = {  # of the 32 in label_colors.txt, those that are no class of the 11 themselves
        (192, 0, 128): 1, (0, 128, 64): 1, (64, 0, 64): 1, (64, 192, 0): 1,  # Archway, Bridge, Tunnel, Wall: building
        (0, 0, 64): 2,  # TrafficCone: pole
        (128, 0, 192): 3, (192, 0, 64): 3,  # LaneMkgsDriv, LaneMkgsNonDriv: road
        (64, 192, 128): 4, (128, 128, 192): 4,  # ParkingBlock, RoadShoulder: pavement
        (192, 192, 0): 5,  # VegetationMisc: tree
        (128, 128, 64): 6, (0, 64, 64): 6,  # Misc_Text, TrafficLight: sign
        (64, 128, 192): 8, (192, 128, 192): 8, (192, 64, 128): 8, (128, 64, 64): 8,  # SUV, Truck_Bus, Train, Other: car
        (192, 128, 64): 9, (64, 0, 192): 9, (64, 128, 64): 9,  # Child, CartLuggagePram, Animal: pedestrian
        (192, 0, 192): 10,  # MotorcycleScooter: bicyclist
        (128, 128, 128): 0, (128, 0, 0): 1, (192, 192, 128): 2, (128, 64, 128): 3, (0, 0, 192): 4, (128, 128, 0): 5,
        (192, 128, 128): 6, (64, 64, 128): 7, (64, 0, 128): 8, (64, 64, 0): 9, (0, 128, 192): 10, (0, 0, 0): 255,
    }  # fmt: skip
    assert len(names) == 32
    picture = np.array([list(names)], np.uint8)
    assert read(tmp_path, encoded(picture), LabelReader(11, "camvid")) == [list(names.values())]
    with pytest.raises(DataError, match=r"colour \(1, 1, 1\) in 1 pixels is that of no class"):
        read(tmp_path, encoded(np.ones((1, 1, 3), np.uint8)), LabelReader(11, "camvid"))


@pytest.mark.parametrize(
    ("reader", "value", "message"),
    [
        (LabelReader(150), 150, r"value 150 .* allowed are 0..149 and 255; .*data.labels=ade20k$"),
        (LabelReader(19), 33, r"value 33 .* allowed are 0..18 and 255; .*_labelIds.png: data.labels=cityscapes$"),
        (LabelReader(5), 5, r"value 5 .* data.labels=from_one$"),
        (LabelReader(11), 11, r"value 11 .* 11 is unlabelled: data.labels=camvid"),
        (LabelReader(171, "cocostuff"), 11, r"value 11 .* allowed are 0..10, 12..24, "),
        (LabelReader(150, "ade20k"), 255, r"value 255 .* allowed are 0..150; .*shifted .*: data.labels=index$"),
        (LabelReader(19, "cityscapes"), 255, r"allowed are 0..33; .*_labelTrainIds.png: data.labels=index$"),
        (LabelReader(21, "voc"), 30, r"allowed are 0..20 and 255"),
        (LabelReader(2, remap={0: 0, 128: 1}), 7, r"value 7 .* allowed are 0, 128 and 255; data.remap says nothing"),
    ],
)
def test_value_without_a_class(tmp_path: Path, reader: LabelReader, value: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        column(tmp_path, [1 if reader.convention == "ade20k" else 0, value], reader)


def test_remap(tmp_path: Path) -> None:
    assert column(tmp_path, [0, 255, 0], LabelReader(2, remap={0: 0, 255: 1})) == [0, 1, 0]
    assert column(tmp_path, [0, 1, 255], LabelReader(2, remap={"0": 1, 1: 0})) == [1, 0, 255]
    assert column(tmp_path, [7, 0, 255, 9], LabelReader(2, remap={7: 1, "other": 255})) == [1, 255, 255, 255]
    assert column(tmp_path, [7, 0, 255], LabelReader(2, remap={7: 1, "other": 0})) == [1, 0, 255]
    assert column(tmp_path, [0, 1, 2, 255], LabelReader(2, remap={"other": 255})) == [0, 1, 255, 255]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 3, "convention": "citiscapes"}, "data.labels must be one of 'index', .*'citiscapes'"),
        ({"classes": 151, "convention": "ade20k"}, "data.labels=ade20k has 150 classes, the names given are 151"),
        ({"classes": 20, "convention": "cityscapes"}, "data.labels=cityscapes has 19 classes"),
        ({"classes": 19, "convention": "cityscapes", "remap": {0: 1}}, "data.remap needs data.labels=index or color"),
        ({"classes": 2, "remap": {0: 2}}, r"data.remap must map to the classes 0..1 or 255, got 2"),
        ({"classes": 2, "remap": {"0 0 0": 9}}, r"data.remap must map to the classes 0..1 or 255, got 9"),
        ({"classes": 2, "convention": "color", "remap": {7: 0}}, "data.remap must have colours 'R G B' .*got 7"),
        ({"classes": 2, "remap": {0: "road"}}, "data.remap must give a class or 255 for 0, got 'road'"),
        ({"classes": 2, "remap": {"0:0": None}}, "must give a class or 255 for '0:0', got None; .*blank after colons"),
        ({"classes": 2, "remap": {"road": 0}}, "data.remap must have values, colours 'R G B' or 'other' as keys"),
        ({"classes": 2, "remap": {"1 2 256": 0}}, "data.remap must have values, colours"),
        ({"classes": 2, "remap": {-1: 0}}, "data.remap must have values, colours 'R G B' or 'other' as keys, got -1"),
    ],
)  # fmt: skip
def test_readers_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelReader(**arguments)
