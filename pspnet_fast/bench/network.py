"""PSPNet-50 as a whole, 473x473, 150 classes: prediction and training steps, against plain torch layers.

Both have the same layers and weights; "eager" is StockPPM, the concatenated head, interpolated logits and
F.cross_entropy or argmax. Whole steps are in channels_last; on a GPU training is in mixed precision (autocast to
bfloat16), prediction in bfloat16, of batch 1 by replays of a CUDA graph; on a CPU all is float32, and prediction by
`optimize`, as pspnet-fast predict has it.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast import PSPNet, UpsampleCrossEntropyLoss, ops, optimize
from pspnet_fast.bench.cases import DTYPES, Case, Compiler, Step, dtype_name, nbytes
from pspnet_fast.bench.stock import StockPPM, upsampled_cross_entropy
from pspnet_fast.ops.kept_memory import nothing_kept

SIZE, CLASSES = 473, 150
BATCH = {"cpu": 2, "cuda": 16}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def cases(device: torch.device) -> Iterator[Case]:
    """The suites model and train on a device."""
    for dtype in DTYPES.values():
        for baseline in ("stock PPM", "FusedPPM"):
            name = f"against {baseline}, {dtype_name(dtype)}"
            make = partial(_forward, SIZE, CLASSES, dtype, baseline == "stock PPM")
            yield Case("model", "head", "PSPNet-50, 473x473: forward", name, dtype, make, 1.25)
    kind = device.type
    for batch in (BATCH[kind], 1):
        yield Case(
            "model", "network", "PSPNet-50, 473x473", f"prediction, batch {batch}", DTYPE[kind],
            partial(_prediction, SIZE, CLASSES, batch), 1.25, standard=batch == 1, quick=batch == 1,
            stock=partial(_stock_prediction, SIZE, CLASSES, batch),
        )  # fmt: skip
    yield Case(
        "train", "network", "PSPNet-50, 473x473", f"training step, batch {BATCH[kind]}", DTYPE[kind],
        partial(_training, SIZE, CLASSES, BATCH[kind]), 1.35, standard=True,
    )  # fmt: skip


def make_network(device: torch.device, classes: int, ours: bool) -> PSPNet:
    """The network, channels_last: as this package builds it, or of plain torch layers."""
    model = PSPNet(classes, head="fused" if ours else "concat")
    if not ours:
        model.ppm = StockPPM(model.ppm)  # type: ignore[arg-type]
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _images(batch: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    shape = (batch, 3, size, size)
    return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _forward(
    size: int, classes: int, dtype: torch.dtype, stock_ppm: bool, device: torch.device, ours: bool,
    compiler: Compiler[Any],
) -> Step:  # fmt: skip
    """The network's forward alone, contiguous; "eager" is the concatenated head with the stock pyramid or FusedPPM."""
    model = PSPNet(classes, head="fused" if ours else "concat").eval().to(device, dtype)
    if stock_ppm and not ours:
        model.ppm = StockPPM(model.ppm)  # type: ignore[arg-type]
    image = torch.randn(1, 3, size, size, dtype=dtype, device=device)
    function = compiler(model)
    return Step(torch.no_grad()(lambda: function(image)), nbytes(image, *model.parameters()))


class _Classes(nn.Module):
    """An image (N, 3, H, W) -> the class of each pixel (N, H, W), of plain torch layers or as this package has it."""

    def __init__(self, model: nn.Module, ours: bool) -> None:
        super().__init__()
        self.model, self.ours = model, ours

    def forward(self, image: Tensor) -> Tensor:
        logits, size = self.model(image)["out"], (image.shape[2], image.shape[3])
        if self.ours:
            return ops.upsample_argmax(logits, size, align_corners=True)
        return F.interpolate(logits, size, mode="bilinear", align_corners=True).argmax(1)


def _stock_prediction(size: int, classes: int, batch: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    dtype = DTYPE[device.type]
    module = _Classes(make_network(device, classes, ours=False), ours=False).to(dtype).eval()
    return module, _images(batch, size, device, dtype)


def _prediction(size: int, classes: int, batch: int, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """Classes of every pixel."""
    dtype = DTYPE[device.type]
    model: nn.Module = make_network(device, classes, ours).to(dtype).eval()
    image = _images(batch, size, device, dtype)
    if ours and device.type == "cpu":  # as predict and eval run it
        model = optimize(model, image)
    function = compiler(_Classes(model, ours))
    predict = torch.no_grad()(lambda: function(image))
    if device.type == "cuda" and batch == 1:
        predict = _graphed(predict)
    return Step(predict, nbytes(image, *model.parameters()))


def _graphed(function: Callable[[], object]) -> Callable[[], object]:
    """Replays of a CUDA graph of the function."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def _training(size: int, classes: int, batch: int, device: torch.device, ours: bool, compiler: Compiler[Any]) -> Step:
    """One step: forward, loss with the auxiliary one, backward, SGD; ours as pspnet-fast train runs it."""
    model = make_network(device, classes, ours).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    loss = UpsampleCrossEntropyLoss() if ours else upsampled_cross_entropy
    image = _images(batch, size, device, torch.float32)
    target = torch.randint(classes, (batch, size, size), device=device)

    def forward(image: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device.type, DTYPE[device.type], enabled=device.type == "cuda"):
            outputs = model(image)
            return loss(outputs["out"], target) + 0.4 * loss(outputs["aux"], target)

    function = compiler(forward)

    def step() -> None:
        with nothing_kept() if ours else nullcontext():
            function(image, target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return Step(step, 3 * nbytes(image, *model.parameters()))
