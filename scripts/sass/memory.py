"""Memory as kernels see it: device memory is this process's own, shared memory an array; and what accesses cost."""

import bisect
import ctypes

import numpy as np

Array = np.ndarray
WARP = 32


class DeviceMemory:
    """Reads and writes the process's memory at the addresses that kernels were given."""

    def __init__(self) -> None:
        self.bases: list[int] = []
        self.mappings: list[tuple[int, Array]] = []

    def find(self, low: int, high: int) -> tuple[int, Array]:
        for again in (False, True):
            if again:
                self.refresh()
            i = bisect.bisect_right(self.bases, low) - 1
            if i >= 0 and self.mappings[i][0] + len(self.mappings[i][1]) >= high:
                return self.mappings[i]
        raise IndexError(f"the kernel accesses {low:#x} to {high:#x}, where there is no memory")

    def refresh(self) -> None:
        """The writable mappings; neighbours are one."""
        spans: list[list[int]] = []
        with open("/proc/self/maps", encoding="utf-8") as maps:
            for line in maps:
                span, rights = line.split()[:2]
                low, high = (int(end, 16) for end in span.split("-"))
                if not rights.startswith("rw"):
                    continue
                if spans and spans[-1][1] == low:
                    spans[-1][1] = high
                else:
                    spans.append([low, high])
        self.bases = [low for low, _ in spans]
        self.mappings = [
            (low, np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))) for low, high in spans
        ]

    def view(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """Words of at most 4 bytes, and the addresses as indices into them."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        base, data = self.find(low, high)
        return data, addresses - base


class SharedMemory:
    """Of one block."""

    def __init__(self) -> None:
        self.data = np.full(256 * 1024, 0xFF, np.uint8)

    def view(self, addresses: Array, size: int) -> tuple[Array, Array]:
        if int(addresses.min()) < 0 or int(addresses.max()) + size > len(self.data):
            raise IndexError(f"the kernel accesses shared memory at {int(addresses.max()):#x}")
        return self.data, addresses


def words(data: Array, size: int) -> Array:
    """The bytes as elements of that size; a few at the end may go."""
    return data[: len(data) // size * size].view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size])


def load(memory: DeviceMemory | SharedMemory, addresses: Array, size: int) -> list[Array]:
    """size bytes a thread, in words of 4 or the one smaller word."""
    if (addresses % size).any():
        raise ValueError("a misaligned access")
    data, at = memory.view(addresses, size)
    word = min(size, 4)
    elements = words(data, word)
    return [elements[at // word + i] for i in range(max(1, size // 4))]


def store(memory: DeviceMemory | SharedMemory, addresses: Array, size: int, values: list[Array]) -> None:
    if (addresses % size).any():
        raise ValueError("a misaligned access")
    data, at = memory.view(addresses, size)
    word = min(size, 4)
    elements = words(data, word)
    for i, value in enumerate(values):
        elements[at // word + i] = value.astype(elements.dtype)


def distinct(keys: Array) -> Array:
    """How many distinct numbers each row holds; negative ones do not count."""
    ordered = np.sort(keys, axis=1)
    first = np.ones(ordered.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (first & (ordered >= 0)).sum(1)


def by_warp(values: Array, mask: Array) -> Array:
    """[warps, 32], -1 where a lane takes no part."""
    count = (len(mask) + WARP - 1) // WARP * WARP
    rows = np.full(count, -1, np.int64)
    rows[: len(mask)][mask] = values[mask]
    return rows.reshape(-1, WARP)


def sectors(addresses: Array, mask: Array) -> tuple[int, Array]:
    """32-byte sectors that the warps' requests touch, and their numbers; no access here crosses one."""
    rows = by_warp(addresses >> 5, mask)
    return int(distinct(rows).sum()), np.unique(rows[rows >= 0])


def wavefronts(addresses: Array, size: int, mask: Array) -> tuple[int, int]:
    """Passes of the warps' accesses through the 32 banks of shared memory, and how many there would be at best.

    A pass takes as many lanes as 128 bytes serve; it is repeated for each further word that it wants of one bank.
    """
    rows = by_warp(addresses, mask)
    lanes = min(WARP, 128 // size)
    rows = rows.reshape(-1, lanes)
    rows = rows[(rows >= 0).any(1)]
    if size > 4:
        parts = np.arange(0, size, 4)
        rows = np.where(rows[:, :, None] >= 0, rows[:, :, None] + parts, -1).reshape(len(rows), -1)
    ordered = np.sort(rows >> 2, axis=1)  # -1 stays negative
    first = ordered >= 0
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    banks = (np.arange(len(ordered))[:, None] * WARP + (ordered & (WARP - 1)))[first]
    counts = np.bincount(banks, minlength=len(ordered) * WARP).reshape(-1, WARP)
    return int(counts.max(1).sum()) if len(ordered) else 0, len(ordered)
