"""Pictures of label maps."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from limits import largest_file

from pspnet_fast.inference import lettering
from pspnet_fast.inference.lettering import drawable, families, text_width
from pspnet_fast.inference.render import colorize, overlay, palette, save_png, side_by_side, with_legend
from pspnet_fast.training.report import draw_curves

COLORS = [(255, 0, 0), (0, 200, 0)]


def test_colorize() -> None:
    picture = colorize(np.array([[0, 1, 255]], np.uint8), COLORS)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[255, 0, 0], [0, 200, 0], [0, 0, 0]]]
    assert colorize(np.array([[1]], np.int64), np.asarray(COLORS)).tolist() == [[[0, 200, 0]]]


@pytest.mark.parametrize("value", [2, 254, -1, 300])
def test_colorize_refuses_unknown_classes(value: int) -> None:
    with pytest.raises(ValueError, match=rf"label must hold 0\.\.1 or 255, got {value}"):
        colorize(np.array([[0, value]]), COLORS)


def test_overlay_blends_labelled_pixels() -> None:
    image = np.full((1, 2, 3), 100, np.uint8)
    label = np.array([[0, 255]], np.uint8)
    assert overlay(image, label, COLORS, alpha=0.25).tolist() == [[[139, 75, 75], [100, 100, 100]]]


def test_side_by_side_holds_the_pictures_under_their_titles_and_a_legend() -> None:
    first, second = (np.full((50, 120, 3), value, np.uint8) for value in (90, 160))
    sheet = side_by_side([[first, second], [second, first]], ["image", "truth"], ["sky", "road"], COLORS)
    assert sheet.shape[1] == 2 * 120 + 8
    assert (sheet[22:72, :120] == 90).all()
    assert (sheet[22:72, 128:] == 160).all()
    assert (sheet[80:130, :120] == 160).all()
    assert sheet[:22].min() < 128  # a title is written
    legend = sheet[138:].reshape(-1, 3).tolist()
    assert [255, 0, 0] in legend
    assert [0, 200, 0] in legend


def test_legend_breaks_into_lines_and_small_pictures_grow() -> None:
    picture = np.zeros((10, 30, 3), np.uint8)
    names = [f"a long class name {index}" for index in range(6)]
    colors = [(index, 0, 200) for index in range(6)]
    sheet = side_by_side([[picture]], ["t"], names, colors, scale=8)
    assert sheet.shape[1] == 240
    assert sheet.shape[0] == 22 + 80 + 8 + 6 * 22
    for color in colors:
        assert (sheet == color).all(-1).any()


def test_side_by_side_refuses_ragged_tables() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"rows must have 2 pictures each .* got \[1\]"):
        side_by_side([[picture]], ["a", "b"], ["c"], COLORS[:1])
    with pytest.raises(ValueError, match=r"rows must hold pictures of one size, got \[\(3, 4, 3\), \(4, 4, 3\)\]"):
        side_by_side([[picture, picture[1:]]], ["a", "b"], ["c"], COLORS[:1])


def test_png_round_trip(tmp_path) -> None:
    label = np.array([[0, 7, 255]], np.uint8)
    save_png(tmp_path / "label.png", label)
    assert cv2.imread(str(tmp_path / "label.png"), cv2.IMREAD_UNCHANGED).tolist() == label.tolist()
    save_png(tmp_path / "color.png", colorize(np.array([[0, 1]]), COLORS))
    assert cv2.imread(str(tmp_path / "color.png")).tolist() == [[[0, 0, 255], [0, 200, 0]]]


@pytest.mark.parametrize("width", [1, 41, 400, 2600])
def test_legend_below_names_what_occurs(width: int) -> None:
    picture = np.random.default_rng(0).integers(1, 200, (30, width, 3)).astype(np.uint8)
    colors = [(255, 0, 0), (0, 201, 0), (3, 2, 251)]
    sheet = with_legend(picture, [0, 2], ["road", "sky", "a rather long name"], colors)
    assert (sheet[:30, :width] == picture).all()
    assert sheet.shape[1] >= width
    below = sheet[30:]
    assert [(below == color).all(-1).any() for color in colors] == [True, False, True]
    assert (below == 0).all(-1).sum() > 20  # the names


def test_names_are_drawn_in_any_script() -> None:
    picture = np.zeros((4, 900, 3), np.uint8)

    def legend(name: str) -> np.ndarray:
        return with_legend(picture, [0], [name], [(9, 9, 9)])[4:]

    drawn = {
        name: legend(name).tobytes() for name in ("Baume", "B\u00e4ume", "\u0434\u043e\u043c", "\u05d3\u05e8", "?")
    }
    assert len(set(drawn.values())) == len(drawn)
    assert legend("Ba\u0308ume").tobytes() == drawn["B\u00e4ume"]  # as macOS writes it
    assert drawable("\u2336 x") == "\u2336 x"  # of another font
    assert families(["a", "\u2336"]) == ["DejaVu Sans", "DejaVu Sans Mono"]
    assert text_width("\u2336", 13) > 0


def test_letters_that_no_font_has_are_written_as_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "_other_fonts", list)
    monkeypatch.setattr(lettering, "_warned", [])
    lettering._font_of.cache_clear()
    with pytest.warns(UserWarning, match=r"no font of this machine has all letters of .* \(U\+9053\): ") as said:
        drawn = [drawable("\u9053 a \u8def"), drawable("\u8def")]
    assert drawn == ["\\u9053 a \\u8def", "\\u8def"]
    assert len(said) == 1
    lettering._font_of.cache_clear()


def test_curves_name_classes_of_any_letters(tmp_path: Path) -> None:
    names = ["stra\u00dfe $x$ $_", "\u0434\u043e\u043c", "\u2336"]
    epoch = {"event": "epoch", "epoch": 1, "step": 1, "miou": 0.5, "macc": 0.5, "allacc": 0.5, "iou": [0.5, 0.5, None]}
    iteration = {"event": "iteration", "step": 1, "loss": 1.0, "lr": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, of a glyph that is missing
        draw_curves([{"event": "config", "class_names": names}, iteration, epoch], tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")) is not None


@pytest.mark.parametrize("classes", [1, 19, 150, 255])
def test_palette_has_a_colour_for_each_class(classes: int) -> None:
    colors = palette(classes)
    assert len(colors) == len(set(colors)) == classes
    assert all(0 <= value <= 255 for color in colors for value in color)
    assert min(map(max, colors)) > 100  # 255 is drawn black


def test_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    small, large = np.zeros((4, 4, 3), np.uint8), np.random.default_rng(0).integers(256, size=(200, 200, 3))
    save_png(path, small)
    with largest_file(1000), pytest.raises(OSError, match=r"cannot be written: .* 0.1 MB needed") as error:
        save_png(path, large.astype(np.uint8))
    assert error.value.filename == str(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.png"]
    assert cv2.imread(str(path)).shape == (4, 4, 3)
