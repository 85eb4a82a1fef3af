"""PSPNet-50 as a whole, 473x473, 150 classes: training steps and prediction, of plain torch layers and of this package.

    PYTHONPATH=.:tests python benchmarks/network.py [--json FILE] [--batch 16] [--compile]

Both have the same layers and weights; "stock" is StockPPM, the concatenated head, interpolated logits and
F.cross_entropy or argmax. All in channels_last; on a GPU training is in mixed precision (autocast to bfloat16),
prediction in bfloat16, of batch 1 by replays of a CUDA graph, and the peak is the allocator's; on a CPU all is float32.
--compile adds torch.compile of both. Times are medians.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comparison import DEVICE
from record import machine
from stock import StockPPM
from tables import network_report
from timing import host_seconds, synchronized
from torch import Tensor, nn
from training_memory import CLASSES, SIZE
from training_memory import stock as stock_loss

from pspnet_fast import PSPNet, UpsampleCrossEntropyLoss, ops

ROUNDS = {"cpu": 3, "cuda": 12}[DEVICE.type]
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
Loss = Callable[[Tensor, Tensor], Tensor]


def make(implementation: str) -> PSPNet:
    """The network on the device, channels_last: of plain torch layers, or as this package builds it."""
    torch.manual_seed(0)
    model = PSPNet(CLASSES, head="concat" if implementation == "stock" else "fused")
    if implementation == "stock":
        model.ppm = StockPPM(model.ppm)
    return model.to(DEVICE, memory_format=torch.channels_last)


def images(batch: int, dtype: torch.dtype) -> Tensor:
    shape = (batch, 3, SIZE, SIZE)
    return torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)


def training(implementation: str, batch: int, compiled: bool) -> Callable[[], object]:
    """One step: forward, loss with the auxiliary one, backward, SGD."""
    model = make(implementation).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    loss: Loss = stock_loss if implementation == "stock" else UpsampleCrossEntropyLoss()
    image, target = images(batch, torch.float32), torch.randint(CLASSES, (batch, SIZE, SIZE), device=DEVICE)

    def forward(image: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, DTYPE, enabled=DEVICE.type == "cuda"):
            outputs = model(image)
            return loss(outputs["out"], target) + 0.4 * loss(outputs["aux"], target)

    run = torch.compile(forward, dynamic=False) if compiled else forward

    def step() -> None:
        run(image, target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def prediction(implementation: str, batch: int, compiled: bool) -> Callable[[], object]:
    """Classes of every pixel."""
    model: nn.Module = make(implementation).to(DTYPE).eval()
    image = images(batch, DTYPE)

    def classes(image: Tensor) -> Tensor:
        logits = model(image)["out"]
        if implementation == "stock":
            return F.interpolate(logits, (SIZE, SIZE), mode="bilinear", align_corners=True).argmax(1)
        return ops.upsample_argmax(logits, (SIZE, SIZE), align_corners=True)

    run = torch.compile(classes, dynamic=False) if compiled else classes

    @torch.no_grad()
    def predict() -> object:
        return run(image)

    return graphed(predict) if DEVICE.type == "cuda" and batch == 1 else predict


def graphed(function: Callable[[], object]) -> Callable[[], object]:
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


def measured(make_function: Callable[..., Callable[[], object]], *arguments: Any) -> dict[str, float]:
    """Seconds (median) and peak bytes of a call."""
    function = synchronized(make_function(*arguments), DEVICE)
    for _ in range(3):
        function()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(host_seconds(function) for _ in range(ROUNDS))
    replays = make_function is prediction and arguments[1] == 1  # whose replays allocate nothing
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" and not replays else 0
    del function
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return {"seconds": seconds, "bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    parser.add_argument(
        "--batch", type=int, default=16 if DEVICE.type == "cuda" else 2, help="the larger (%(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile of both: minutes more")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    cases = [
        ("training step", training, args.batch),
        ("prediction", prediction, args.batch),
        ("prediction", prediction, 1),
    ]
    rows = []
    for name, function, batch in cases:
        for compiled in (False, True) if args.compile else (False,):
            for implementation in ("stock", "fused"):
                row = {"case": f"{name}, batch {batch}", "batch": batch}
                row["implementation"] = implementation + (", compiled" if compiled else "")
                rows.append(row | measured(function, implementation, batch, compiled))
                print(f"{row['case']}, {row['implementation']}: {rows[-1]['seconds'] * 1e3:.1f} ms", flush=True)
    print(f"\n{network_report(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
