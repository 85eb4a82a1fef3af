"""Images of one size together, whatever their order."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Key = TypeVar("Key")
WAITING = 4  # batches' worth of images, at most, that wait for others of their size


def batches(images: Iterable[tuple[Key, Any]], size: int) -> Iterator[list[tuple[Key, Any]]]:
    """Gather up to ``size`` images of one shape, without reading far ahead.

    Args:
        images: pairs of a key and an image (H, W, 3).

    Yields:
        the pairs, each once; those of one shape in their order.
    """
    waiting: dict[tuple[int, ...], list[tuple[Key, Any]]] = {}
    for key, image in images:
        group = waiting.setdefault(image.shape, [])
        group.append((key, image))
        if len(group) == size:
            yield waiting.pop(image.shape)
        elif sum(map(len, waiting.values())) >= WAITING * size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()
