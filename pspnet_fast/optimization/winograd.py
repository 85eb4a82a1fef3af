"""A 3x3 convolution by Winograd's minimal filtering (Lavin & Gray, CVPR 2016): 25 products for 9 results, not 81.

The result of a tile of 3x3 pixels is A^T [(G w G^T) * (B^T x B)] A, where x is the 5x5 pixels under it; summed over
input channels, the product in brackets is one matrix product for each of its 25 places. A dilated convolution is one
for each of the dilation's phases, which see none of each other's pixels.

In float32 it errs by about 2e-6 of the greatest result, as torch's own convolution of 2048 channels does (5e-6 in
contiguous layout, 1e-6 in channels-last). F(4x4, 3x3) would save a fifth more and errs by 7e-6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 3  # pixels of a result a side; its input has two more
_PLACES = TILE + 2
_LEAST_PIXELS = 1024  # of a map
_CHUNK_ELEMENTS = 1 << 23  # of transformed input at a time: 32 MB, what a cache may hold
INPUT = ((2, -1, -2, 1, 0), (0, -2, -1, 1, 0), (0, 2, -3, 1, 0), (0, -1, 0, 1, 0), (0, 2, -1, -2, 1))  # B^T
_WEIGHT = ((1 / 2, 0, 0), (-1 / 2, -1 / 2, -1 / 2), (-1 / 6, 1 / 6, -1 / 6), (1 / 6, 1 / 3, 2 / 3), (0, 0, 1))  # G
OUTPUT = ((1, 1, 1, 1, 0), (0, 1, -1, 2, 0), (0, 1, 1, 4, 1))  # A^T


def transformed_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (25, C, O), in its dtype."""
    o, c = weight.shape[:2]
    g = torch.tensor(_WEIGHT, dtype=torch.float64)
    places = torch.kron(g, g).to(weight.dtype)
    return (places @ weight.permute(2, 3, 1, 0).reshape(9, c * o)).view(_PLACES**2, c, o)


def tiles(size: int, dilation: int) -> int:
    """How many tiles a phase of an axis has."""
    return -(-size // (dilation * TILE))


def has_fewer_products(size: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether the tiles, which may jut out of a map, need less than two thirds of the products of its pixels."""
    down, across = (tiles(s, d) * d for s, d in zip(size, dilation, strict=True))
    pixels = size[0] * size[1]
    return pixels >= _LEAST_PIXELS and 3 * _PLACES**2 * down * across < 2 * 9 * pixels


def convolve(input: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """A convolution that keeps the size of a map, without bias.

    Args:
        input: (N, C, H, W).
        weight: (25, C, O) of :func:`transformed_weight`.

    Returns:
        (N, O, H, W), channels-last.
    """
    n, c, height, width = input.shape
    o, d = weight.size(2), dilation
    down, across = tiles(height, d), tiles(width, d)
    # (N, pixels of a phase, phases) vertically, then horizontally, and channels
    padded = input.new_zeros(n, (down * TILE + 2) * d, (across * TILE + 2) * d, c)
    padded[:, d : d + height, d : d + width].copy_(input.permute(0, 2, 3, 1))
    padded = padded.view(n, down * TILE + 2, d, across * TILE + 2, d, c)
    output = input.new_empty(n, down, TILE, d, across, TILE, d, o)
    row = n * d * across * d  # tiles
    step = max(1, min(down, _CHUNK_ELEMENTS // (_PLACES**2 * row * c)))
    rows_of = input.new_empty(_PLACES, n, step, d, across * TILE + 2, d, c)
    memory = input.new_empty(_PLACES**2 * step * row * c)
    for first in range(0, down, step):
        count = min(step, down - first)
        above = [padded[:, first * TILE + a :: TILE][:, :count] for a in range(_PLACES)]
        rows = rows_of[:, :, :count]
        for coefficients, result in zip(INPUT, rows, strict=True):
            _combine(coefficients, above, result)
        beside = [rows[:, :, :, :, b::TILE][:, :, :, :, :across] for b in range(_PLACES)]
        transformed = memory[: _PLACES**2 * count * row * c].view(_PLACES, _PLACES, n, count, d, across, d, c)
        for place, coefficients in enumerate(INPUT):
            _combine(coefficients, beside, transformed[:, place])
        products = torch.bmm(transformed.view(_PLACES**2, -1, c), weight)
        parts = products.view(_PLACES, _PLACES, n, count, d, across, d, o)
        summed = input.new_empty(TILE, *parts.shape[1:])
        for coefficients, result in zip(OUTPUT, summed, strict=True):
            _combine(coefficients, parts, result)
        columns = [summed[:, place].movedim(0, 2) for place in range(_PLACES)]  # (N, count, TILE, d, across, d, O)
        for place, coefficients in enumerate(OUTPUT):
            _combine(coefficients, columns, output[:, first : first + count, :, :, :, place])
    whole = output.view(n, down * TILE * d, across * TILE * d, o)[:, :height, :width]
    return whole.contiguous().permute(0, 3, 1, 2)


def _combine(coefficients: Sequence[float], parts: Sequence[Tensor] | Tensor, result: Tensor) -> None:
    """Writes the sum of parts times coefficients into a tensor."""
    terms = [(k, part) for k, part in zip(coefficients, parts, strict=True) if k]
    (first, one), (second, two), *rest = sorted(terms, key=lambda term: term[0] != 1)  # each row has a 1 and another
    assert first == 1
    torch.add(one, two, alpha=second, out=result)
    for k, part in rest:
        result.add_(part, alpha=k)
