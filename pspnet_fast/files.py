"""Files written whole or not at all."""

import errno
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` once the block has ended well; until then ``path`` stays as it was.

    Args:
        path: in an existing folder.
        needed: bytes that the block will write, for the message where they do not fit.

    Raises:
        OSError: the file cannot be written; it names ``path``, the reason and, where known, the bytes needed and free.
            Nothing of the new file stays.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _flush_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        reason = f"cannot be written: {cause.strerror or cause}"
        if needed:
            reason += f"; {megabytes(needed)} needed"
            with suppress(OSError):
                reason += f", {megabytes(shutil.disk_usage(path.parent).free)} free"
        if path.exists():
            reason += "; the file before it is whole"
        raise OSError(cause.errno, reason, str(path)) from None


@contextmanager
def replacing_beside(path: Path) -> Iterator[Path]:
    """A path of the same name in an empty folder beside it, for writers that take names and write several files.

    What lies there when the block has ended well takes the places beside ``path``, ``path`` itself last. Until then all
    stays as it was, and nothing of the new ones stays where the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        yield new
        for file in sorted(new.parent.iterdir(), key=lambda file: file == new):
            place = path.with_name(file.name)
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            os.replace(file, place)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a power cut does not undo a rename."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # some network file systems flush no folders
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise OSError if the disk of ``folder`` has less than ``needed`` bytes free for ``what``."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        reason = f"no space for {what}: {megabytes(needed)} needed, {megabytes(free)} free"
        raise OSError(errno.ENOSPC, reason, str(folder))


def wrong_archive(path: Path) -> str | None:
    """What is wrong with a file of torch.save before torch looks at it; None if nothing is seen.

    torch checks no checksums: damaged weights would load.
    """
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        return "is empty"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "is a zip archive, but none that torch.save wrote"
            try:
                damaged = archive.testzip()
            except (zipfile.BadZipFile, OSError, NotImplementedError):
                damaged = "its table of contents"
        return f"is damaged ({damaged} is not as it was written)" if damaged else None
    if begin.startswith(b"PK"):
        return "is damaged: its end is missing, so it was not copied or downloaded whole"
    if begin.startswith(b"\x80"):
        return None  # a pickle: what torch.save wrote before 1.6; torch says what is in it
    text = all(byte in b"\t\n\r\f" or byte >= 32 for byte in begin)
    return f"is damaged or no checkpoint: {'a text file' if text else 'no archive'} that begins with {begin[:24]!r}"


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB"


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind ``error``; torch hides it behind one of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
