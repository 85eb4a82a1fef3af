"""Images and labels named by a list file, and the class names and colours that go with them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from pspnet_fast.data import IGNORE_INDEX, DataError
from pspnet_fast.data.transforms import Image, Label

Transform = Callable[[Image, Label, np.random.Generator], tuple[Tensor, Tensor]]


def read_image(path: Path) -> Image:
    """Read an image as float32 RGB (H, W, 3), 0..255.

    Raises:
        DataError: the file is missing or no image that OpenCV can read.
    """
    return cv2.cvtColor(_read(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(np.float32)


def read_label(path: Path) -> Label:
    """Read a label image as uint8 (H, W), a class index or 255 per pixel.

    Raises:
        DataError: the file is missing, no image, or not single-channel 8-bit.
    """
    label = _read(path, cv2.IMREAD_UNCHANGED)
    if label.ndim != 2 or label.dtype != np.uint8:
        channels = 1 if label.ndim == 2 else label.shape[2]
        raise DataError(
            f"{path}: a label must be a single-channel 8-bit image of class indices, "
            f"got {channels} channel(s) of {label.dtype}"
        )
    return label


def _read(path: Path, flags: int) -> np.ndarray:
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    decoded = cv2.imdecode(content, flags) if content.size else None
    if decoded is None:
        raise DataError(f"{path}: is not an image that OpenCV can decode")
    return decoded


def read_names(path: Path) -> list[str]:
    """Class names, one a line, by index.

    Raises:
        FileNotFoundError: no such file.  ValueError: no name in it, or more than 255.
    """
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not 1 <= len(names) <= IGNORE_INDEX:
        raise ValueError(f"{path}: must hold 1 to {IGNORE_INDEX} class names, has {len(names)}")
    return names


def read_colors(path: Path, classes: int) -> list[tuple[int, int, int]]:
    """Class colours, ``R G B`` (0..255) a line, by index.

    Raises:
        FileNotFoundError: no such file.  ValueError: another number of lines than ``classes``, or a line that is no
            colour.
    """
    colors = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            red, green, blue = map(int, line.split())
        except ValueError:
            raise ValueError(f"{path}:{number}: must be 'R G B', got {line!r}") from None
        if not all(0 <= value <= 255 for value in (red, green, blue)):
            raise ValueError(f"{path}:{number}: colours lie in 0..255, got {line!r}")
        colors.append((red, green, blue))
    if len(colors) != classes:
        raise ValueError(f"{path}: has {len(colors)} colours for {classes} classes")
    return colors


def read_list(root: Path, list_file: Path) -> list[tuple[Path, Path]]:
    """Pairs of a list file with lines ``IMAGE LABEL``, both relative to ``root``; every file must exist.

    Raises:
        FileNotFoundError: the list or a file that it names is missing.  ValueError: a line without two names, or no
            line at all.
    """
    pairs = []
    for number, line in enumerate(list_file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 2:
            raise ValueError(f"{list_file}:{number}: must be 'IMAGE LABEL', got {line!r}")
        image, label = (root / field for field in fields)
        for path in (image, label):
            if not path.is_file():
                raise FileNotFoundError(f"{list_file}:{number}: no file {path}")
        pairs.append((image, label))
    if not pairs:
        raise ValueError(f"{list_file}: names no image")
    return pairs


class ListDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of (image float32 (3, H, W), label int64 (H, W)) named by a list file.

    An item depends on (seed, epoch, index) only, whatever the number of workers.

    Args:
        root: folder to which the names in the list are relative.
        list_file: lines ``IMAGE LABEL``.
        classes: number of classes K; labels hold 0..K-1 or 255.
        transform: maps (image, label, generator) to the two tensors.
        seed: of the transform's random choices.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_list`. Reading an item raises :class:`DataError` for a file that
        is no image, a label of another size than its image, or a label value that is neither a class nor 255.
    """

    def __init__(self, root: Path, list_file: Path, classes: int, transform: Transform, seed: int = 0) -> None:
        self.list_file = list_file
        self.pairs = read_list(root, list_file)
        self.classes = classes
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the random choices; call it before an iterator over a DataLoader starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.read(index)
        return self.transform(image, label, np.random.default_rng((self.seed, self.epoch, index)))

    def read(self, index: int) -> tuple[Image, Label]:
        """Image and label of one pair, checked, before the transform."""
        image_path, label_path = self.pairs[index]
        image, label = read_image(image_path), read_label(label_path)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{label_path}: label of {_size(label.shape)} for an image of {_size(image.shape)} ({image_path})"
            )
        wrong = label[(label >= self.classes) & (label != IGNORE_INDEX)]
        if wrong.size:
            raise DataError(
                f"{label_path}: label value {wrong[0]} ({wrong.size} pixels outside the classes); "
                f"allowed are 0..{self.classes - 1} and {IGNORE_INDEX}"
            )
        return image, label


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]} pixels"
