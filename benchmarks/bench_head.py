"""FusedPSPHead against the concatenated head of plain torch layers, what it costs beside the convolution of x, and a
whole PSPNet-50 with either head."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import DEVICE, IMPLEMENTATIONS, Case, Comparison, cases, nbytes
from stock import StockPPM
from torch import Tensor, nn

import pspnet_fast.head
from pspnet_fast import FusedPPM, FusedPSPHead, PSPNet, ops, split_weight

SHAPES = [(1, 2048, 60, 60), (1, 2048, 90, 90)]
EVALUATION, TRAINING = "FusedPSPHead, evaluation: forward", "FusedPSPHead, training: forward + backward"
KEPT = "FusedPSPHead, evaluation, against one that keeps its weight's parts"
CONVOLUTION, NETWORK = "FusedPSPHead beside the convolution of x", "PSPNet-50, 473x473: forward"
TARGETS = {torch.float32: {EVALUATION: 2.0, TRAINING: 1.95}, torch.bfloat16: {EVALUATION: 1.9, TRAINING: 1.9}}
if DEVICE.type == "cuda":
    TARGETS = {dtype: {EVALUATION: 1.85, TRAINING: 1.7} for dtype in TARGETS}


def make_head(implementation: str, case: Case, device: torch.device) -> nn.Module:
    """FusedPSPHead, or the stock pyramid and bottleneck."""
    ppm = FusedPPM(case.shape[1])
    bottleneck = [nn.Conv2d(ppm.out_channels, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()]
    if implementation == "fused":
        head: nn.Module = FusedPSPHead(ppm, *bottleneck)
    else:
        head = nn.Sequential(StockPPM(ppm), *bottleneck)
    if implementation == "compile":
        head.compile(dynamic=False)
    return head.to(device, case.dtype, memory_format=case.memory_format)


def comparison(table: str, case: Case, floor_bytes: int, convolutions: int) -> Comparison:
    """With the operations of so many convolutions of x, forward or backward."""
    n, c, h, w = case.shape
    operations = convolutions * 2 * n * h * w * c * 512 * 9
    return Comparison(table, str(case), floor_bytes, TARGETS[case.dtype][table], operations, case.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases(*SHAPES), ids=str)
def test_evaluation(measure: Callable[..., None], device: torch.device, case: Case, implementation: str) -> None:
    head, x = make_head(implementation, case, device).eval(), case.random_map(device)
    floor = nbytes(x, *head.parameters()) + nbytes(x) // 4
    against = comparison(EVALUATION, case, floor, convolutions=1)
    with torch.no_grad():
        measure(against, implementation, lambda: head(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases(*SHAPES), ids=str)
def test_training(measure: Callable[..., None], device: torch.device, case: Case, implementation: str) -> None:
    """At batch 1 the norm of bin 1, without batch statistics there, is in evaluation mode, in all implementations."""
    head, x = make_head(implementation, case, device), case.random_map(device).requires_grad_()
    if case.shape[0] == 1:
        (head.ppm if implementation == "fused" else head[0]).features[0][2].eval()
    grad = case.random_map(device, 512)

    def forget_gradients() -> None:
        x.grad = None
        head.zero_grad(set_to_none=True)

    floor = 3 * nbytes(x, *head.parameters(), grad)
    against = comparison(TRAINING, case, floor, convolutions=3)
    measure(against, implementation, lambda: head(x).backward(grad), forget_gradients)


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("case", cases(*SHAPES), ids=str)
def test_beside_the_convolution(
    measure: Callable[..., None], device: torch.device, case: Case, implementation: str
) -> None:
    """ "eager" is the convolution of x alone: the ratio is its share of the head's time, 0.94 or more is meant."""
    head, x = make_head("fused", case, device).eval(), case.random_map(device)
    weight = head.bottleneck[0].weight[:, : case.shape[1]].contiguous(memory_format=case.memory_format)
    against = Comparison(CONVOLUTION, str(case), nbytes(x, weight), 1 / 1.06)
    function = (lambda: head(x)) if implementation == "fused" else (lambda: F.conv2d(x, weight, padding=1))
    with torch.no_grad():
        measure(against, implementation, function)


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("case", cases(SHAPES[0]), ids=str)
def test_no_kept_weight(
    measure: Callable[..., None], device: torch.device, case: Case, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "eager" is a head that would keep its weight's parts between calls, at the risk of old ones: 0.96 is meant."""
    head, x = make_head("fused", case, device).eval(), case.random_map(device)
    if implementation == "eager":
        monkeypatch.setattr(pspnet_fast.head, "level_products", keeping())
    with torch.no_grad():
        measure(Comparison(KEPT, str(case), nbytes(x), 1 / 1.04), implementation, lambda: head(x))


def keeping() -> Callable[..., Any]:
    """level_products with the first call's parts."""
    kept: list[Tensor] = []

    def products(weight: Tensor, dense: int, dense_first: bool, reduced: Tensor, bins: list[int], dtype: Any) -> Any:
        if not kept:
            levels = len(bins) // 2
            kept.extend(ops.pyramid_split_weight(weight, dense, levels, dense_first=dense_first, dtype=dtype))
        first, matrices = kept
        return first, split_weight.taps_of(reduced, matrices, bins, weight)

    return products


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("baseline", ["stock PPM", "FusedPPM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_network(
    measure: Callable[..., None], device: torch.device, dtype: torch.dtype, baseline: str, implementation: str
) -> None:
    """ "eager" is the concatenated head, with the pyramid of plain torch layers or with FusedPPM."""
    model = PSPNet(150, "resnet50", head="fused" if implementation == "fused" else "concat").eval().to(device, dtype)
    if implementation == "eager" and baseline == "stock PPM":
        model = copy.deepcopy(model)
        model.ppm = StockPPM(model.ppm)
    image = torch.randn(1, 3, 473, 473, dtype=dtype, device=device)
    name = f"against {baseline}, {str(dtype).removeprefix('torch.')}"
    against = Comparison(NETWORK, name, nbytes(image, *model.parameters()), 1.25)
    with torch.no_grad():
        measure(against, implementation, lambda: model(image))
