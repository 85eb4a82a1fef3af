"""A call of every kernel of maps and logits, through torch.ops: of any dtype, layout and number of images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import pspnet_fast.ops  # noqa: F401  (loads the operators)

o = torch.ops.pspnet_fast
BINS = [1, 1, 2, 3]
CELLS = 7
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MEAN = 1  # the reduction's number


class Call(NamedTuple):
    """A call and the tensors that it is given and may write to, each with a part of every image."""

    function: Callable[..., object]
    given: list[Tensor]

    def run(self, given: list[Tensor]) -> list[Tensor]:
        """The results, and `given` as the call leaves them."""
        result = self.function(*given)
        results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
        return [*results, *given]


def count(prediction: Tensor, target: Tensor) -> Tensor:
    counts = torch.zeros(19, 19, dtype=torch.int64, device=target.device)
    o.confusion_matrix_(counts, prediction, target, 255)
    return counts


def calls(
    dtype: torch.dtype, layout: str, images: int = 1, reduction: int = MEAN, device: str | torch.device = "cpu"
) -> dict[str, Call]:
    """Calls by operator, of random values."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    def a_map(channels: int, height: int = 7, width: int = 9) -> Tensor:
        return random(images, channels, height, width).contiguous(memory_format=LAYOUTS[layout])

    def cells(channels: int) -> Tensor:
        return random(images, CELLS, channels)

    last = layout == "channels_last"
    wide = torch.promote_types(dtype, torch.float32)
    weights = [random(16, 32, 1, 1) for _ in range(2)]
    norm = [torch.rand(16).to(device, dtype) + 0.5 for _ in range(4)]
    target = torch.randint(0, 19, (images, 21, 25), device=device)
    lse = torch.full((images, 21, 25), 4.0, dtype=wide, device=device)
    loss, total = torch.ones((), dtype=wide, device=device), torch.tensor(1000.0, dtype=wide, device=device)
    rest = (True, 255, 0.1, reduction)
    return {
        "pyramid_pool": Call(lambda x, y: o.pyramid_pool(x, y, 0, BINS), [a_map(16), a_map(32)]),
        "pyramid_pool_backward": Call(
            lambda g, y: o.pyramid_pool_backward(g, y, 0, BINS, 7, 9, last),
            [cells(16), a_map(32)],
        ),
        "pyramid_reduce": Call(
            lambda x: o.pyramid_reduce(x, weights, norm * 2, [1e-5] * 2, True, BINS),
            [cells(32)],
        ),
        "pyramid_reduce_backward": Call(
            lambda g, x: o.pyramid_reduce_backward(g, x, weights, BINS),
            [cells(16), cells(32)],
        ),
        "pyramid_upsample_concat_": Call(
            lambda y, z: o.pyramid_upsample_concat_(y, z, 16, BINS, True),
            [a_map(48), cells(16)],
        ),
        "pyramid_upsample_concat_backward": Call(
            lambda y: o.pyramid_upsample_concat_backward(y, 16, 16, BINS, True),
            [a_map(48)],
        ),
        "pyramid_context_": Call(
            lambda y, t: o.pyramid_context_(y, t, norm, 1e-5, True, BINS, [3, 3], [1, 1], 1, True),
            [a_map(16), random(images, CELLS, 9, 16)],
        ),
        "pyramid_context_backward": Call(
            lambda y: o.pyramid_context_backward(y, BINS, [3, 3], [1, 1], 1),
            [a_map(16)],
        ),
        "upsample_argmax": Call(lambda z: o.upsample_argmax(z, 21, 25, True, True), [a_map(19)]),
        "upsample_softmax_accumulate_": Call(
            lambda p, z: o.upsample_softmax_accumulate_(p, z, 1, 2, 21, 25, True, True, 0.5),
            [torch.randn(images, 16, 24, 29).to(device, wide), a_map(16)],
        ),
        "upsample_cross_entropy": Call(lambda z, t: o.upsample_cross_entropy(z, t, None, *rest), [a_map(24), target]),
        "upsample_cross_entropy_backward": Call(
            lambda z, t, lse: o.upsample_cross_entropy_backward(
                loss if reduction else loss.expand(t.shape), z, t, None, lse, total, *rest
            ),
            [a_map(24), target, lse],
        ),
        "confusion_matrix_": Call(count, [target.roll(1).to(torch.uint8), target]),
    }
