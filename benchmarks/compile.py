"""PSPNet inside PyTorch: of plain torch layers and as this package builds it, eager, compiled and optimized.

    PYTHONPATH=.:tests python benchmarks/compile.py [--json FILE] [--threads 2] [--rounds 7] [--bf16] [--no-compile]

Logits of one image, all with the same weights and random running statistics. "stock" is StockPPM and the concatenated
head. All functions of a run are timed in turn, round after round; ratios are medians over rounds of the time divided by
that of "stock eager" in the same round. Also the largest difference from it, relative to its largest logit.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pspnet_fast import PSPNet, optimize
from pspnet_fast.bench.record import machine
from pspnet_fast.bench.stock import StockPPM
from pspnet_fast.bench.timing import host_seconds, synchronized

Forward = Callable[[], Tensor]
REFERENCE = "stock eager"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(classes: int, backbone: str) -> PSPNet:
    """In evaluation, whose norms are no identities."""
    torch.manual_seed(0)
    model = PSPNet(classes, backbone)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(DEVICE).eval()


def stock(model: PSPNet, classes: int, backbone: str) -> PSPNet:
    other = PSPNet(classes, backbone, head="concat").to(DEVICE)
    other.load_state_dict(model.state_dict())
    other.ppm = StockPPM(other.ppm)
    return other.eval()


def forwards(dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Forward]:
    fused = network(args.classes, args.backbone)
    plain = stock(fused, args.classes, args.backbone)
    image = torch.randn(args.batch, 3, args.size, args.size, device=DEVICE).to(dtype)
    functions = {"optimize": optimize(fused, image, dtype=dtype)}
    models = {"stock": plain.to(dtype), "fused": fused.to(dtype)}
    functions |= {f"{name} eager": model for name, model in models.items()}
    functions["fused channels_last"] = network(args.classes, args.backbone).to(dtype, memory_format=torch.channels_last)
    if not args.no_compile:
        functions |= {f"{name} compile": torch.compile(model, dynamic=False) for name, model in models.items()}

    def forward(model: nn.Module, image: Tensor) -> Forward:
        return lambda: model(image)["out"]

    last = image.contiguous(memory_format=torch.channels_last)
    return {name: forward(m, last if name.endswith("last") else image) for name, m in functions.items()}


@torch.no_grad()
def measured(dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, object]]:
    functions = forwards(dtype, args)
    expected = functions[REFERENCE]().float()
    differences = {}
    for name, function in functions.items():
        difference = (function().float() - expected).abs().max() / expected.abs().max()
        differences[name] = difference.item()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(args.rounds):
        for name, function in functions.items():
            times[name].append(host_seconds(synchronized(function, DEVICE)))
    rows = []
    for name in functions:
        ratios = [t / s for t, s in zip(times[name], times[REFERENCE], strict=True)]
        row = {"dtype": str(dtype).removeprefix("torch."), "implementation": name}
        numbers = {"seconds": statistics.median(times[name]), "ratio": statistics.median(ratios)}
        rows.append({**row, **numbers, "difference": differences[name], "times": times[name]})
        print(f"{row['dtype']:9} {name:20} {numbers['seconds'] * 1e3:8.1f} ms  {numbers['ratio']:.3f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each that count (%(default)s)")
    parser.add_argument("--classes", type=int, default=19, help="K (%(default)s)")
    parser.add_argument("--size", type=int, default=473, help="side of the image (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images (%(default)s)")
    parser.add_argument("--backbone", default="resnet50", help="a name of pspnet_fast.models.resnet (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16 as well")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for dtype in (torch.float32, torch.bfloat16)[: 1 + args.bf16] for row in measured(dtype, args)]
    if args.json:
        record = {"machine": machine(DEVICE), "threads": args.threads, "size": args.size, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
