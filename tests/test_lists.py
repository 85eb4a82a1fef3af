"""Lists, names and colours as editors, spreadsheets and other systems write them."""

from pathlib import Path

import numpy as np
import pytest

from pspnet_fast.data.lists import read_colors, read_list, read_names, spread_colors

BOM = b"\xef\xbb\xbf"


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "file.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("line", "image", "label"),
    [
        ("a.jpg a.png", "a.jpg", "a.png"),
        ("  a.jpg \t  a.png  ", "a.jpg", "a.png"),
        ("a.jpg    a.png", "a.jpg", "a.png"),
        ("my photo 1.jpg\tmy label 1.png", "my photo 1.jpg", "my label 1.png"),
        ("my photo 1.jpg,my label 1.png", "my photo 1.jpg", "my label 1.png"),
        ("my photo 1.jpg, my label 1.png", "my photo 1.jpg", "my label 1.png"),
        ('"my photo 1.jpg" "my label 1.png"', "my photo 1.jpg", "my label 1.png"),
        ('"my photo 1.jpg"   a.png', "my photo 1.jpg", "a.png"),
        ('"a, b.jpg","a, b.png"', "a, b.jpg", "a, b.png"),
        ("a,b.jpg a.png", "a,b.jpg", "a.png"),
        ('4"x6".jpg a.png', '4"x6".jpg', "a.png"),
        ("O'Brien.jpg a.png", "O'Brien.jpg", "a.png"),
        ("straße.jpg a.png", "straße.jpg", "a.png"),
        (r"sub\a.jpg sub\a.png", "sub/a.jpg", "sub/a.png"),
        (r"sub\a.jpg a\b.png", "sub/a.jpg", r"a\b.png"),
        ("./a.jpg sub/../a.png", "a.jpg", "a.png"),
    ],
)
def test_ways_to_write_a_pair(tmp_path: Path, line: str, image: str, label: str) -> None:
    touch(tmp_path, image, label, "sub/a.txt")
    [pair] = read_list(tmp_path, write(tmp_path, line + "\n"))
    assert [path.resolve() for path in pair] == [tmp_path / image, tmp_path / label]


def test_absolute_names(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png")
    path = write(tmp_path, f"{tmp_path / 'a.jpg'} {tmp_path / 'a.png'}\n")
    assert read_list(Path("elsewhere"), path) == [(tmp_path / "a.jpg", tmp_path / "a.png")]


@pytest.mark.parametrize("content", [BOM + b"a b\r\nc d\r\n", b"a b\rc d", b"\n\na b  \n \t\r\nc d"])
def test_byte_order_mark_line_ends_and_blank_lines(tmp_path: Path, content: bytes) -> None:
    touch(tmp_path, *"abcd")
    pairs = [(tmp_path / "a", tmp_path / "b"), (tmp_path / "c", tmp_path / "d")]
    assert read_list(tmp_path, write(tmp_path, content)) == pairs
    assert read_names(write(tmp_path, content)) == ["a b", "c d"]
    numbers = content.replace(b"a b", b"1 2 3").replace(b"c d", b"4 5 6")
    assert read_colors(write(tmp_path, numbers), 2) == [(1, 2, 3), (4, 5, 6)]


def test_names_with_what_str_splitlines_takes_for_a_line_end(tmp_path: Path) -> None:
    assert read_names(write(tmp_path, "a\x85b\nc\u2028d\n")) == ["a\x85b", "c\u2028d"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, "gelb 1\nstraße 2\n".encode(encoding))
    for read in (lambda: read_list(tmp_path, path), lambda: read_names(path), lambda: read_colors(path, 2)):
        with pytest.raises(ValueError, match=r"file.txt.* is not UTF-8.*; save the file as text in UTF-8"):
            read()


@pytest.mark.parametrize("line", ["a.jpg", "my photo.jpg my label.png", "0,a.jpg,a.png", '"my photo.jpg', ",a.png"])
def test_line_that_is_no_pair(tmp_path: Path, line: str) -> None:
    touch(tmp_path, "ok")
    with pytest.raises(ValueError, match=r"file.txt:2: must be 'IMAGE LABEL', got .* a tab or comma .* double quotes"):
        read_list(tmp_path, write(tmp_path, f"ok ok\n{line}\n"))


def test_names_of_no_file(tmp_path: Path) -> None:
    touch(tmp_path, "a", "sub/b")
    with pytest.raises(FileNotFoundError, match=r"file.txt:2: no file .*gone.png"):
        read_list(tmp_path, write(tmp_path, "a a\na gone.png\n"))
    with pytest.raises(FileNotFoundError, match=r"file.txt:1: .*sub is a folder, not a file"):
        read_list(tmp_path, write(tmp_path, "a sub\n"))
    with pytest.raises(ValueError, match=r"file.txt: names no image"):
        read_list(tmp_path, write(tmp_path, "\n\r\n"))


def test_names(tmp_path: Path) -> None:
    assert read_names(write(tmp_path, "traffic light\nroad \n")) == ["traffic light", "road"]
    with pytest.raises(ValueError, match=r"file.txt:4: the name 'road' stands in line 1 already"):
        read_names(write(tmp_path, "road\n\ncar\nroad\n"))
    for count in (0, 256):
        with pytest.raises(ValueError, match=f"must hold 1 to 255 class names, has {count}"):
            read_names(write(tmp_path, "".join(f"{index}\n" for index in range(count))))


def test_colors(tmp_path: Path) -> None:
    assert read_colors(write(tmp_path, "1 2 3\n4,5,6\n7, 8,\t9\n"), 3) == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    with pytest.raises(ValueError, match="has 1 colours for 4 classes"):
        read_colors(write(tmp_path, "1 2 3\n"), 4)
    for line, message in (("1 2", "file.txt:1: must be 'R G B'"), ("1 2 256", r"colours lie in 0\.\.255")):
        with pytest.raises(ValueError, match=message):
            read_colors(write(tmp_path, line), 1)


def test_spread_colors() -> None:
    colors = spread_colors(255)
    assert len({*colors, (0, 0, 0), (255, 255, 255)}) == 257
    assert spread_colors(7) == colors[:7]
    first = np.array([(0, 0, 0), (255, 255, 255), *colors[:12]])
    apart = np.abs(first[:, None] - first).max(-1)
    assert apart[~np.eye(14, dtype=bool)].min() >= 100
