"""Data sets and transforms. Items are (image float32 (3, H, W), label int64 (H, W)); label 255 is ignored."""

IGNORE_INDEX = 255


class DataError(ValueError):
    """An image or label that cannot be used; the message names the file and what is wrong with it."""

    def __init__(self, message: str) -> None:
        # A DataLoader rebuilds an error of its worker from the traceback as text, whose last line is the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class UnreadableError(DataError):
    """A file that is missing, damaged or no image at all."""
