"""Peak memory of one forward pass of a pyramid pooling module, above what was there before it.

On the CPU it is the growth of the resident set of a fresh process, which sees the kernels' own scratch as well as
tensors. On a GPU it is the allocator's count.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from stock import StockPPM
from torch import nn

from pspnet_fast import FusedPPM, FusedPSPHead

ROOT = Path(__file__).parents[1]


def forward_memory(
    implementation: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
    training: bool = False,
) -> int:
    """Bytes, those of the output included.

    Args:
        implementation: of the pyramid, "fused" or "stock"; of the pyramid with its bottleneck, "fused head" or "stock
            head"; "convolution": that of x alone in the bottleneck.
    """
    names = [str(value).removeprefix("torch.") for value in (dtype, memory_format)]
    arguments = json.dumps([implementation, list(shape), *names, str(device), training])
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # With a fixed threshold glibc hands every large block back at once: none is left to be used a second time unseen.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, __file__, arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(result.stdout)


def make_module(implementation: str, channels: int) -> nn.Module:
    ppm, o = FusedPPM(channels), channels // 4
    conv = nn.Conv2d(channels if implementation == "convolution" else ppm.out_channels, o, 3, padding=1, bias=False)
    match implementation:
        case "fused":
            return ppm
        case "stock":
            return StockPPM(ppm)
        case "fused head":
            return FusedPSPHead(ppm, conv, nn.BatchNorm2d(o), nn.ReLU())
        case "stock head":
            return nn.Sequential(StockPPM(ppm), conv, nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())


def _measure(implementation: str, shape: Sequence[int], dtype: str, layout: str, device: str, training: bool) -> int:
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_grad_enabled(training)
    n, c, h, w = shape
    module = make_module(implementation, c).to(device).train(training)
    if n == 1:
        module.features[0][2].eval()  # one value a channel has no batch statistics
    x = torch.empty(n, c, h, w, device=device, memory_format=getattr(torch, layout)).normal_()
    module(x[:, :, :8, :8])  # loads code and starts threads
    if device == "cpu":
        before = _status("VmRSS")
        output = module(x)
        return _status("VmHWM") - before
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = module(x)  # noqa: F841  (kept while the peak is read)
    return torch.cuda.max_memory_allocated(device) - before


def _status(field: str) -> int:
    """A size that Linux keeps of this process. (getrusage's ru_maxrss would be that of its parent, if greater.)"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


if __name__ == "__main__":
    print(_measure(*json.loads(sys.argv[1])))
