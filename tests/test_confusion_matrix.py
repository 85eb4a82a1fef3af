"""confusion_matrix: counts, dtypes, layouts, values out of range, registration, bad input."""

import itertools

import pytest
import torch

from pspnet_fast import ops, reference

pytestmark = pytest.mark.usefixtures("poison")

INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]


def labels(k: int, shape: tuple[int, ...], device, ignored: float = 0.2):
    """(prediction, target) of int64; a part of target is 255."""
    prediction, target = (torch.randint(0, k, shape).to(device) for _ in range(2))
    target[torch.rand(shape).to(device) < ignored] = 255
    return prediction, target


@pytest.mark.parametrize("k", [1, 2, 19, 111, 150, 255])  # in shared memory up to 110 classes
@pytest.mark.parametrize("shape", [(2, 37, 53), (20000,), ()])
def test_counts(device, shape, k):
    prediction, target = labels(k, shape, device)
    counts = ops.confusion_matrix(prediction, target, k)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, reference.confusion_matrix(prediction, target, k))
    assert counts.sum() == (target != 255).sum()


def test_against_a_loop_over_pixels(device):
    prediction, target = labels(4, (2, 5, 7), device)
    expected = [[0] * 4 for _ in range(4)]
    for truth, guess in zip(target.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if truth != 255:
            expected[truth][guess] += 1
    assert ops.confusion_matrix(prediction, target, 4).tolist() == expected


def test_many_classes(device):
    """More cells than a thread counts on its own."""
    prediction, target = labels(300, (3, 91, 83), device)
    assert torch.equal(
        ops.confusion_matrix(prediction, target, 300), reference.confusion_matrix(prediction, target, 300)
    )


def test_every_dtype(device):
    prediction, target = labels(150, (2, 31, 17), device)
    expected = reference.confusion_matrix(prediction, target, 150)
    for p, t in itertools.product(INTEGERS, INTEGERS):
        assert torch.equal(ops.confusion_matrix(prediction.to(p), target.to(t), 150), expected)


def test_strides(device):
    prediction, target = labels(7, (12, 10, 14), device)
    p, t = prediction.transpose(0, 2)[1:, ::2], target.transpose(0, 2)[1:, ::2]
    assert torch.equal(ops.confusion_matrix(p, t, 7), reference.confusion_matrix(p, t, 7))


@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 255])
def test_ignore_index(device, ignore_index):
    prediction, target = labels(5, (9, 31), device, ignored=0)
    target[::4] = ignore_index
    counts = ops.confusion_matrix(prediction, target, 5, ignore_index)
    assert torch.equal(counts, reference.confusion_matrix(prediction, target, 5, ignore_index))


def test_accumulates_in_place(device):
    out = torch.full((5, 5), 2**40, dtype=torch.int64, device=device)
    prediction, target = labels(5, (9, 31), device)
    expected = out + 2 * reference.confusion_matrix(prediction, target, 5)
    for _ in range(2):
        assert ops.confusion_matrix(prediction, target, 5, out=out) is out
    assert torch.equal(out, expected)


def test_same_counts_with_every_number_of_threads():
    prediction, target = labels(300, (2, 300, 300), "cpu")
    threads = torch.get_num_threads()
    expected = reference.confusion_matrix(prediction, target, 300)
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        assert torch.equal(ops.confusion_matrix(prediction, target, 300), expected)
    torch.set_num_threads(threads)


def runs_cpu_kernels(device: torch.device) -> bool:
    """Not those of a GPU, nor their sources in place of the CPU's."""
    registration = torch._C._dispatch_dump("pspnet_fast::confusion_matrix_")
    cpu = next(line for line in registration.splitlines() if line.startswith("CPU"))
    return device.type == "cpu" and "confusion_matrix.cpp" in cpu


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (0, 5, r"target must be in \[0, 5\) or ignore_index = 255, but holds 5"),
        (0, -1, r"target must be in \[0, 5\) or ignore_index = 255, but holds -1"),
        (7, 4, r"prediction must be in \[0, 5\), but holds 7"),
        (-(2**62), 4, r"prediction must be in \[0, 5\), but holds -4611686018427387904"),
    ],
)
def test_values_out_of_range(device, prediction, target, message):
    """A CPU says which, before it counts; CUDA leaves such pixels out."""
    predictions, targets = labels(5, (40, 1000), device, ignored=0)
    expected = reference.confusion_matrix(predictions.flatten()[:-1], targets.flatten()[:-1], 5)
    predictions[-1, -1], targets[-1, -1] = prediction, target
    out = torch.zeros(5, 5, dtype=torch.int64, device=device)
    if runs_cpu_kernels(device):
        with pytest.raises(IndexError, match=message):
            ops.confusion_matrix(predictions, targets, 5, out=out)
        assert not out.any()
    else:
        assert torch.equal(ops.confusion_matrix(predictions, targets, 5, out=out), expected)


def test_predictions_of_ignored_pixels_may_be_anything(device):
    target = torch.full((4, 4), 255, dtype=torch.uint8, device=device)
    assert not ops.confusion_matrix(torch.full_like(target, 200), target, 3).any()


def test_opcheck(device):
    prediction, target = labels(5, (9, 31), device)
    counts = torch.zeros(5, 5, dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.pspnet_fast.confusion_matrix_.default, (counts, prediction, target, 255))


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)  # the compiler knows no kernels
def test_compiles_with_dynamic_sizes(device):
    def function(prediction, target):
        return ops.confusion_matrix(prediction, target, 5)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((4, 5), (6, 3)):
        arguments = labels(5, shape, device)
        assert torch.equal(compiled(*arguments), function(*arguments))


def test_no_pixel(device):
    nothing = torch.empty(0, 3, 4, dtype=torch.uint8, device=device)
    assert torch.equal(ops.confusion_matrix(nothing, nothing, 2), torch.zeros(2, 2, dtype=torch.int64, device=device))


B, I = torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int64)  # noqa: E741


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((B.float(), B, 4), TypeError, "prediction must be a Tensor of uint8, int16, int32 or int64, but is torch.fl"),
        ((B, [0], 4), TypeError, "target must be a Tensor of .*, but is list"),
        ((B, B.T, 4), ValueError, r"prediction must have shape that of target = \(3, 2\), but has \(2, 3\)"),
        ((B, B.to("meta"), 4), ValueError, "prediction must be on the device of target, meta, but is on cpu"),
        ((B, B, 0), ValueError, "K must be an int >= 1, but is 0"),
        ((B, B, 4, 255, I.int()), TypeError, "out must be contiguous and int64, but is torch.int32"),
        ((B, B, 3, 255, I), ValueError, r"out must have shape \(K, K\) = \(3, 3\), but has \(4, 4\)"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.confusion_matrix(*arguments)


def test_the_raw_operator_checks_too():
    raw = torch.ops.pspnet_fast.confusion_matrix_
    with pytest.raises(RuntimeError, match="one shape"):
        raw(I, B, B.T, 255)
    with pytest.raises(RuntimeError, match=r"counts must be a contiguous int64 \(K, K\)"):
        raw(I[:, :3], B, B, 255)
    with pytest.raises(RuntimeError, match="target must be uint8"):
        raw(I, B, B.float(), 255)
