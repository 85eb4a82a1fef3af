"""What is written in place may neither overlap itself nor what is read, as for torch's own in-place operators."""

import random

import pytest
import torch

from pspnet_fast import ops, reference

BINS = (1, 2)
ITSELF = "more than one element of .*refers to a single memory location"
INPUT = "some elements of .* refer to a single memory location"


def taps(n: int, o: int) -> torch.Tensor:
    return torch.randn(n, 5, 9, o)


def expanded(*shape: int) -> torch.Tensor:
    return torch.zeros(1, *shape[1:]).expand(shape)


WRITES_INTO_ITSELF = {
    "pyramid_pool": lambda: ops.pyramid_pool(torch.randn(2, 4, 5, 5), BINS, concat=expanded(2, 8, 5, 5)),
    "pyramid_upsample_concat_": lambda: ops.pyramid_upsample_concat_(
        expanded(2, 8, 5, 5), torch.randn(2, 5, 3), BINS, offset=0
    ),
    "pyramid_context_": lambda: ops.pyramid_context_(expanded(2, 3, 5, 5), taps(2, 3), BINS, 3),
    "upsample_softmax_accumulate_": lambda: ops.upsample_softmax_accumulate_(
        torch.zeros(1, 1, 9, 9).expand(1, 3, 9, 9), torch.randn(1, 3, 4, 4), align_corners=True
    ),
    "pyramid_pool, rows that share columns": lambda: ops.pyramid_pool(
        torch.randn(1, 2, 5, 5), BINS, concat=torch.zeros(100).as_strided((1, 2, 5, 5), (50, 25, 4, 1))
    ),
}


@pytest.mark.parametrize("name", WRITES_INTO_ITSELF)
def test_outputs_that_overlap_themselves_are_refused(device, name):
    with pytest.raises(RuntimeError, match=ITSELF):
        WRITES_INTO_ITSELF[name]()


def pool(offset: int) -> None:
    concat = torch.randn(2, 8, 6, 6)
    ops.pyramid_pool(concat[:, :4], BINS, concat=concat, offset=offset)


def upsample() -> None:
    concat = torch.randn(1, 6, 5, 5)
    ops.pyramid_upsample_concat_(concat, concat[:, :, 0, :].transpose(1, 2)[:, :, :3], BINS, offset=0)


def context(part: str) -> None:
    buffer = torch.randn(1000)
    conv = buffer[:75].view(1, 3, 5, 5)
    own = buffer[70:205].view(1, 5, 9, 3) if part == "taps" else taps(1, 3)
    scale = buffer[74:77] if part == "norm" else torch.ones(3)
    ops.pyramid_context_(conv, own, BINS, 3, norm=(torch.ones(3), torch.ones(3), torch.ones(3), scale, 1e-5))


def softmax(rows: slice) -> None:
    probabilities = torch.rand(1, 3, 9, 9)
    logits = probabilities[:, :, rows, :4]
    ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True, size=(4, 9))


def count(which: str) -> None:
    out = torch.zeros(3, 3, dtype=torch.int64)
    free = torch.zeros(9, dtype=torch.int64)
    arguments = {"prediction": free, "target": free, which: out.view(-1)}
    ops.confusion_matrix(**arguments, K=3, out=out)


def count_bytes() -> None:
    out = torch.zeros(3, 3, dtype=torch.int64)
    labels = out.view(torch.uint8).view(-1)[71:]  # the last byte
    ops.confusion_matrix(labels, torch.zeros_like(labels), K=3, out=out)


READS_WHAT_IT_WRITES = {
    "pyramid_pool, a channel on": lambda: pool(1),
    "pyramid_pool, the last channel": lambda: pool(3),
    "pyramid_upsample_concat_": upsample,
    "pyramid_context_, taps": lambda: context("taps"),
    "pyramid_context_, norm": lambda: context("norm"),
    "upsample_softmax_accumulate_": lambda: softmax(slice(0, 4)),
    "upsample_softmax_accumulate_, a row": lambda: softmax(slice(3, 7)),
    "confusion_matrix, prediction": lambda: count("prediction"),
    "confusion_matrix, target": lambda: count("target"),
    "confusion_matrix, a byte": count_bytes,
}


@pytest.mark.parametrize("name", READS_WHAT_IT_WRITES)
def test_outputs_that_overlap_their_inputs_are_refused(device, name):
    with pytest.raises(RuntimeError, match=INPUT):
        READS_WHAT_IT_WRITES[name]()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [4, 5])
def test_channels_beside_the_input_in_one_buffer_are_written(device, memory_format, offset):
    concat = torch.randn(2, 9, 6, 6).contiguous(memory_format=memory_format)
    before = concat.clone()
    pooled = ops.pyramid_pool(concat[:, :4], BINS, concat=concat, offset=offset)
    assert torch.equal(pooled, ops.pyramid_pool(before[:, :4].clone(memory_format=memory_format), BINS))
    assert torch.equal(concat[:, offset : offset + 4], before[:, :4])
    assert torch.equal(concat[:, :offset], before[:, :offset])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_copy_onto_the_input_itself_leaves_it(device, memory_format):
    concat = torch.randn(2, 8, 6, 6).contiguous(memory_format=memory_format)
    before = concat.clone()
    pooled = ops.pyramid_pool(concat[:, 2:6], BINS, concat=concat, offset=2)
    assert torch.equal(concat, before)
    torch.testing.assert_close(pooled, reference.pyramid_pool(before[:, 2:6], BINS))


def test_a_copy_onto_the_input_itself_has_the_gradient_of_both_uses(device):
    def gradient(module):
        leaf = torch.linspace(-1, 1, 2 * 8 * 36, dtype=torch.float64).view(2, 8, 6, 6).requires_grad_()
        concat = leaf * 2
        pooled = module.pyramid_pool(concat[:, :4], BINS, concat=concat, offset=0)
        return torch.autograd.grad(pooled.square().sum() + concat.pow(3).sum(), leaf)[0]

    torch.testing.assert_close(gradient(ops), gradient(reference))


def test_windows_and_rows_between_one_another_are_written(device):
    buffer = torch.rand(1, 3, 18, 9)
    logits, probabilities = buffer[:, :, ::2, :4], buffer[:, :, 1::2]
    expected = reference.upsample_softmax_accumulate_(probabilities.clone(), logits.clone(), align_corners=True)
    torch.testing.assert_close(ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True), expected)


def places(view: torch.Tensor, size: int) -> torch.Tensor:
    """The places in its buffer, a byte a place, one for each element."""
    numbers = torch.arange(size).as_strided(view.shape, view.stride(), view.storage_offset())
    return numbers.flatten()


def strided(choice: random.Random, buffer: torch.Tensor, rank: int) -> torch.Tensor:
    while True:
        shape = [choice.randint(1, 4) for _ in range(rank)]
        strides = [choice.choice([0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 30, 48, 60]) for _ in range(rank)]
        extent = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if extent < buffer.numel():
            return buffer.as_strided(shape, strides, choice.randint(0, buffer.numel() - 1 - extent))


def test_strides_of_every_kind_are_judged_by_the_places_they_name():
    """Against the sets of places themselves: nothing legal is refused, nothing else accepted."""
    choice, verdicts = random.Random(0), set()
    for _ in range(1500):
        buffer = torch.zeros(400)
        probabilities, logits = strided(choice, buffer, 4), strided(choice, buffer, 4)
        logits = logits[:1].expand(probabilities.size(0), -1, -1, -1)[:, :1].expand(-1, probabilities.size(1), -1, -1)
        written, read = places(probabilities, 400), places(logits, 400)
        itself = written.unique().numel() < written.numel()
        other = bool(torch.isin(read, written).any())
        verdicts.add((itself, other))
        message = ""
        try:
            ops.upsample_softmax_accumulate_(probabilities, logits, align_corners=True)
        except RuntimeError as error:
            message = str(error)
        assert ("more than one element" in message) == itself
        assert (message != "") == (itself or other)
    assert len(verdicts) == 4


WRITTEN = {
    "pyramid_pool": lambda out: ops.pyramid_pool(torch.randn(1, 4, 5, 5), BINS, concat=out),
    "pyramid_upsample_concat_": lambda out: ops.pyramid_upsample_concat_(out, torch.randn(1, 5, 3), BINS, offset=0),
    "pyramid_context_": lambda out: ops.pyramid_context_(out, taps(1, 8), BINS, 3),
    "upsample_softmax_accumulate_": lambda out: ops.upsample_softmax_accumulate_(
        out, torch.randn(1, 8, 3, 3), align_corners=True
    ),
    "confusion_matrix": lambda out: ops.confusion_matrix(
        torch.zeros(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8), 10, out=out
    ),
}


def output(name: str) -> torch.Tensor:
    return torch.zeros(10, 10, dtype=torch.int64) if name == "confusion_matrix" else torch.zeros(1, 8, 5, 5)


@pytest.mark.parametrize("name", WRITTEN)
def test_inference_tensors_are_written_in_inference_mode_only(device, name):
    with torch.inference_mode():
        out = output(name)
        WRITTEN[name](out)
    with pytest.raises(RuntimeError, match="inference tensor"):
        WRITTEN[name](out)
    with torch.no_grad(), pytest.raises(RuntimeError, match="nference tensor"):
        out.add_(1)  # as torch


@pytest.mark.parametrize("name", WRITTEN)
def test_ordinary_tensors_are_written_in_inference_mode_too(device, name):
    out = output(name)
    with torch.inference_mode():
        WRITTEN[name](out)


def test_counts_count_up_the_version():
    """Else autograd would not notice that what it has saved is overwritten."""
    out, labels = torch.zeros(5, 5, dtype=torch.int64), torch.zeros(5, dtype=torch.uint8)
    ops.confusion_matrix(labels, labels, 5, out=out)
    assert out._version == 1
