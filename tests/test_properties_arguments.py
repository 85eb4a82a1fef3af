"""Arguments that are wrong in a random way are refused by name or taken rightly; so are outputs that share memory."""

from collections.abc import Callable
from typing import Any

import properties
import test_properties
import test_properties_fuse
import test_properties_logits
import test_properties_modules
import torch
from properties import Draw, bits, holds_for_all
from torch import Tensor

from pspnet_fast import ops, reference

BINS = (1, 2)
SOUND: dict[str, Callable[[], dict[str, Any]]] = {
    "pyramid_pool": lambda: {
        "input": torch.randn(2, 3, 5, 4),
        "bins": BINS,
        "concat": torch.zeros(2, 6, 5, 4),
        "offset": 2,
    },
    "pyramid_reduce": lambda: {
        "pooled": torch.randn(2, 5, 3),
        "weights": [torch.randn(4, 3), torch.randn(4, 3)],
        "bins": BINS,
        "norm": [(*(torch.rand(4) for _ in range(4)), 0.1) for _ in BINS],
        "relu": True,
    },
    "pyramid_batch_norm": lambda: {
        "reduced": torch.randn(2, 5, 3),
        "bins": BINS,
        "norm": [(*(torch.rand(3) for _ in range(4)), 0.1) for _ in BINS],
        "training": [True, False],
        "momentum": [0.1, 0.1],
        "relu": True,
    },
    "pyramid_split_weight": lambda: {
        "weight": torch.randn(2, 10, 3, 3),
        "dense": 4,
        "levels": 2,
        "dense_first": True,
        "dtype": torch.float32,
    },
    "pyramid_upsample_concat_": lambda: {
        "concat": torch.zeros(2, 9, 5, 4),
        "reduced": torch.randn(2, 5, 3),
        "bins": BINS,
        "offset": 2,
        "align_corners": False,
    },
    "pyramid_context_": lambda: {
        "conv": torch.randn(2, 3, 5, 4),
        "taps": torch.randn(2, 5, 9, 3),
        "bins": BINS,
        "kernel_size": 3,
        "dilation": 1,
        "mode": "nearest",
        "align_corners": False,
        "accumulate": True,
        "relu": True,
        "norm": (*(torch.rand(3) for _ in range(4)), 0.1),
    },
    "upsample_argmax": lambda: {"logits": torch.randn(2, 3, 4, 3), "size": (7, 6), "align_corners": True},
    "upsample_softmax_accumulate_": lambda: {
        "probabilities": torch.zeros(2, 3, 8, 7),
        "logits": torch.randn(2, 3, 4, 3),
        "align_corners": False,
        "mirrored": True,
        "top": 1,
        "left": 2,
        "size": (5, 4),
        "weight": 0.5,
    },
    "confusion_matrix": lambda: {
        "prediction": torch.randint(0, 3, (2, 4)),
        "target": torch.randint(0, 3, (2, 4)),
        "K": 3,
        "ignore_index": 255,
        "out": torch.zeros(3, 3, dtype=torch.int64),
    },
    "upsample_cross_entropy": lambda: {
        "logits": torch.randn(2, 3, 4, 3),
        "target": torch.randint(0, 3, (2, 7, 6)),
        "size": (7, 6),
        "weight": torch.rand(3),
        "label_smoothing": 0.1,
        "align_corners": False,
        "ignore_index": 255,
        "reduction": "mean",
    },
}
WRONG: list[Any] = [
    None, "x", "", b"", 1.5, -1, 0, 7, 2**31, 2**62, 2**63, 2.0**70, -(2**63), float("nan"), float("inf"), True, 1j,
    object(), [], (), (0,), (0, 0), (1, 2, 3), [-1], [(1,)], [(1, 2, 3)], [[2, 3], 1], ["1"], [None], [2**40], [True],
    {}, {"a": 1}, (7, 2**40), (1.0, 2.0), range(3), Tensor, torch.float32,
]  # fmt: skip
CHANGES: list[Callable[[Tensor], Any]] = [
    lambda t: t[:0],
    lambda t: t[:1],
    lambda t: t[..., :-1],
    lambda t: t[:, :0] if t.dim() > 1 else t[:0],
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t.sum(),
    lambda t: t.transpose(0, -1),
    lambda t: t.int(),
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.tolist(),
    lambda t: t.numpy(),
    lambda t: torch.cat([t, t]),
    lambda t: t + 100,
]


@holds_for_all
def test_invalid_arguments(draw: Draw) -> None:
    """One argument exchanged: it raises and names the argument, or gives what the reference gives for it."""
    name = draw.choice([*SOUND])
    torch.manual_seed(0)
    arguments = SOUND[name]()
    wrong = draw.choice([*arguments])
    value = arguments[wrong]
    if isinstance(value, Tensor) and draw.flag():
        arguments[wrong] = draw.choice(CHANGES)(value)
    elif isinstance(value, (list, tuple)) and draw.flag():  # a part of it
        place = draw.integer(0, len(value) - 1)
        part = value[place]
        changed = draw.choice(CHANGES)(part) if isinstance(part, Tensor) and draw.flag() else draw.choice(WRONG)
        arguments[wrong] = type(value)([*value[:place], changed, *value[place + 1 :]])
    else:
        arguments[wrong] = draw.choice(WRONG)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor) and not v.is_sparse}
    copies = {**arguments, **{k: v.clone() for k, v in before.items()}}
    named = [wrong, *ALSO.get((name, wrong), ())]
    refused = None
    try:
        result = getattr(ops, name)(**arguments)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        refused = error
    if refused is None:
        exact = getattr(reference, name)(**copies)
        torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-4, equal_nan=True)
        return
    assert any(word in str(refused) for word in named), f"{type(refused).__name__}: {refused} ({wrong})"
    assert ".cpp" not in str(refused)
    for key, tensor in before.items():
        assert tensor.is_meta or torch.equal(bits(arguments[key]), bits(tensor)), f"raised, and wrote {key}"


# what else may be named: the other one of two that do not agree
ALSO = {
    ("pyramid_pool", "input"): ["concat", "offset"],
    ("pyramid_pool", "concat"): ["offset"],
    ("pyramid_reduce", "pooled"): ["weights", "norm"],
    ("pyramid_reduce", "weights"): ["norm"],
    ("pyramid_reduce", "bins"): ["pooled", "weights", "norm"],
    ("pyramid_batch_norm", "reduced"): ["norm", "running statistics"],
    ("pyramid_batch_norm", "norm"): ["running statistics", "training", "running_means", "running_vars"],
    ("pyramid_batch_norm", "bins"): ["reduced", "norm", "training", "momentum"],
    ("pyramid_split_weight", "weight"): ["dense", "levels", "dtype"],
    ("pyramid_split_weight", "dense"): ["levels"],
    ("pyramid_upsample_concat_", "concat"): ["reduced", "offset"],
    ("pyramid_upsample_concat_", "reduced"): ["offset"],
    ("pyramid_upsample_concat_", "bins"): ["reduced", "offset"],
    ("pyramid_context_", "conv"): ["taps", "norm"],
    ("pyramid_context_", "bins"): ["taps"],
    ("pyramid_context_", "kernel_size"): ["taps"],
    ("upsample_softmax_accumulate_", "logits"): ["probabilities"],
    ("upsample_softmax_accumulate_", "probabilities"): ["logits", "window"],
    ("upsample_softmax_accumulate_", "top"): ["window"],
    ("upsample_softmax_accumulate_", "left"): ["window"],
    ("upsample_softmax_accumulate_", "size"): ["window"],
    ("confusion_matrix", "target"): ["prediction", "out"],
    ("confusion_matrix", "K"): ["out", "target", "prediction"],
    ("upsample_cross_entropy", "logits"): ["target", "weight"],
    ("upsample_cross_entropy", "target"): ["size"],
}


@holds_for_all
def test_shared_memory(draw: Draw) -> None:
    """What is written lies anywhere in one buffer with what is read: refused, or as if each had its own."""
    name = draw.choice(["pyramid_pool", "pyramid_upsample_concat_", "pyramid_context_", "upsample_softmax_accumulate_"])
    buffer = torch.randn(400, generator=torch.Generator().manual_seed(draw.integer(0, 99)))

    def view(*shape: int) -> Tensor:
        strides = list(torch.empty(shape).stride())
        kind = draw.choice(["dense", "dense", "channels last", "still", "short"])
        if kind == "channels last" and len(shape) == 4:
            strides = list(torch.empty(shape, memory_format=torch.channels_last).stride())
        elif kind in ("still", "short"):
            axis = draw.integer(0, len(shape) - 1)
            strides[axis] = 0 if kind == "still" else max(1, strides[axis] - 1)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return buffer.as_strided(shape, strides, draw.integer(0, 400 - span))

    offset, align_corners = draw.integer(0, 1), draw.flag()
    written, read, call, region = {  # the region of `written` that is written
        "pyramid_pool": lambda: (
            view(2, 4, 4, 3),
            view(2, 2, 4, 3),
            lambda f, out, x: f(x, BINS, concat=out, offset=offset),
            (slice(None), slice(offset, offset + 2)),
        ),
        "pyramid_upsample_concat_": lambda: (
            view(2, 5, 4, 3),
            view(2, 5, 2),
            lambda f, out, x: f(out, x, BINS, offset=offset, align_corners=align_corners),
            (slice(None), slice(offset, offset + 4)),
        ),
        "pyramid_context_": lambda: (
            view(1, 3, 4, 3),
            view(1, 5, 3, 3),
            lambda f, out, x: f(out, x, BINS, (1, 3), align_corners=align_corners),
            (slice(None),),
        ),
        "upsample_softmax_accumulate_": lambda: (
            view(1, 3, 7, 6),
            view(1, 3, 3, 4),
            lambda f, out, x: f(out, x, align_corners=align_corners, top=1, left=2, size=(5, 4)),
            (slice(None), slice(None), slice(1, 6), slice(2, 6)),
        ),
    }[name]()
    before, apart, inside = buffer.clone(), written.double(), torch.zeros(400, dtype=torch.bool)
    places = torch.arange(400).as_strided(written.shape, written.stride(), written.storage_offset())
    inside[places[region].flatten()] = True
    exact = call(getattr(reference, name), apart, read.double())
    refused = None
    try:
        result = call(getattr(ops, name), written, read)
    except RuntimeError as error:
        refused = str(error)
    assert torch.equal(buffer[~inside], before[~inside])
    if refused is not None:
        assert "memory location" in refused or "contiguous or channels-last" in refused
        assert torch.equal(buffer, before)
        return
    close = {"rtol": 1e-5, "atol": 1e-5}  # a few roundings of numbers of about 1 in float32
    torch.testing.assert_close(written[region].double(), apart[region], **close)
    if name == "pyramid_pool":
        torch.testing.assert_close(result.double(), exact, **close)


def test_there_are_as_many_examples_as_promised() -> None:
    for module in (test_properties, test_properties_logits, test_properties_modules, test_properties_fuse):
        assert module.__doc__
    assert properties.EXAMPLES.keys() == properties.FOUND
    assert sum(properties.EXAMPLES.values()) >= 2000
