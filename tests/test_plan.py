"""What a prediction reads and writes: no input and no other result is ever overwritten."""

import os
from pathlib import Path

import pytest

from pspnet_fast.inference.plan import check_results, plan


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def results(*arguments: str, out: str = "out") -> set[str]:
    return {str(path) for task in plan([Path(name) for name in arguments], Path(out)) for path in task.results.values()}


def three(stem: str) -> set[str]:
    return {f"{stem}.png", f"{stem}_color.png", f"{stem}_overlay.png"}


def test_a_file(photos: Path) -> None:
    touch("some/street.JPG")
    assert results("some/street.JPG") == three("out/street")
    assert results("some/street.JPG", "./some/../some/street.JPG", str(photos / "some/street.JPG")) == three(
        "out/street"
    )


def test_a_folder_keeps_its_structure(photos: Path) -> None:
    touch("in/a.jpg", "in/x/a.jpg", "in/x/y/b.WebP", "in/notes.txt", "in/.hidden/c.jpg", "in/._a.jpg", "in/x/Thumbs.db")
    assert results("in") == three("out/a") | three("out/x/a") | three("out/x/y/b")
    assert results("in/x", out="in/out") == three("in/out/a") | three("in/out/y/b")
    touch("in/out/a.png", "in/out/deep/z.png")  # of an earlier run
    tasks = plan([Path("in")], Path("in/out"), overwrite=True)
    assert {str(task.image) for task in tasks} == {"in/a.jpg", "in/x/a.jpg", "in/x/y/b.WebP"}
    touch("empty/readme.md")
    with pytest.raises(ValueError, match=r"empty: no image in this folder \(.bmp, "):
        plan([Path("empty")], Path("out"))


def test_what_cannot_be_used_stops_the_others_on_request(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a.jpg", "in/b.jpg", "in/locked/c.jpg", "empty/readme.md")
    scandir = os.scandir

    def locked(path: str) -> object:  # permissions do not stop the superuser
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    arguments = [Path(name) for name in ("none.jpg", "empty", "in", "a.jpg")]
    failed: list[Exception] = []
    tasks = plan(arguments, Path("out"), failed=failed)
    assert [str(task.image) for task in tasks] == ["in/b.jpg", "a.jpg"]
    assert [type(error) for error in failed] == [FileNotFoundError, ValueError, PermissionError]
    with pytest.raises(PermissionError):
        plan([Path("in")], Path("out"))


def test_patterns_that_the_shell_left(photos: Path) -> None:
    touch("a/1.jpg", "a/2.jpg", "b/3.jpg", "odd[1].jpg")
    assert results("a/*.jpg") == three("out/1") | three("out/2")
    assert results("**/[23].jpg") == three("out/2") | three("out/3")
    assert results("odd[1].jpg") == three("out/odd[1]")
    for name in ("c/*.jpg", "nothing.jpg"):
        with pytest.raises(FileNotFoundError, match="no image "):
            plan([Path(name)], Path("out"))


@pytest.mark.parametrize(
    ("files", "arguments", "out", "message"),
    [
        (["p.png"], ["p.png"], ".", "p.png of p.png would overwrite the image p.png"),
        (["in/p.png"], ["in"], "in", "would overwrite the image in/p.png"),
        (["s.jpg", "s_color.png"], ["s.jpg", "s_color.png"], ".", "would overwrite the image s_color.png"),
        (["S.PNG"], ["S.PNG"], ".", "would overwrite the image S.PNG"),
        (["s.jpg", "s_color.jpg"], ["s.jpg", "s_color.jpg"], "out", "s.jpg and s_color.jpg would both be written to"),
        (["s.jpg", "s_overlay.jpg"], ["."], "out", "would both be written to out/s_overlay.png"),
        (["s.jpg", "s.png"], ["s.jpg", "s.png"], "out", "would both be written to out/s.png"),
        (["s.jpg", "S.jpg"], ["s.jpg", "S.jpg"], "out", "would both be written to out/S.png"),
        (["a/s.jpg", "b/s.jpg"], ["a/s.jpg", "b/s.jpg"], "out", "or name their common folder"),
        (["a/s.jpg", "b/s.jpg"], ["a", "b"], "out", "would both be written to out/s.png"),
        (["e\u0301.jpg", "\u00e9.png"], ["e\u0301.jpg", "\u00e9.png"], "out", "would both be written to"),
    ],
)
def test_clashes_are_refused(photos: Path, files: list[str], arguments: list[str], out: str, message: str) -> None:
    touch(*files)
    for overwrite in (False, True):  # it is no licence for these
        with pytest.raises(ValueError, match=message):
            plan([Path(name) for name in arguments], Path(out), overwrite=overwrite)
    assert {name: Path(name).read_text() for name in files} == {name: name for name in files}


def test_links(photos: Path) -> None:
    touch("real/p.png", "real/q.jpg")
    os.symlink("real", "same")
    with pytest.raises(ValueError, match=r"would overwrite the image real/p.png"):
        plan([Path("real/p.png")], Path("same"))
    os.symlink("p.png", "real/link.jpg")
    with pytest.raises(ValueError, match=r"link.png|p.png"):
        plan([Path("real")], Path("real"), overwrite=True)
    os.symlink("../real/q.jpg", "same/linked.png")  # the link is an image too: it must not be replaced
    with pytest.raises(ValueError, match=r"would overwrite the image real/linked.png"):
        plan([Path("real/linked.png")], Path("real"), overwrite=True)


def test_existing_results_need_overwrite(photos: Path) -> None:
    touch("s.jpg", "out/s_color.png", "out/s.png", "out/other.png")
    with pytest.raises(ValueError, match=r"out/s.png and 1 more results exist: replace with --overwrite"):
        plan([Path("s.jpg")], Path("out"))
    assert len(plan([Path("s.jpg")], Path("out"), overwrite=True)) == 1
    os.remove("out/s.png")
    with pytest.raises(ValueError, match=r"out/s_color.png exists: "):
        plan([Path("s.jpg")], Path("out"))
    os.remove("out/s_color.png")
    os.symlink("nowhere", "out/s_overlay.png")
    with pytest.raises(ValueError, match=r"out/s_overlay.png exists: "):
        plan([Path("s.jpg")], Path("out"))


def test_other_inputs_stay() -> None:
    with pytest.raises(ValueError, match=r"the result a.png of b.jpg would overwrite the image a.png"):
        check_results([(Path("b.jpg"), Path("a.png"))], inputs=[Path("a.png")], overwrite=True)
