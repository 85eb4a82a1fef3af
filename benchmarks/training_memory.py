"""Peak memory of one training step of PSPNet-50 (batch 2, 473x473, 150 classes) by how it takes its loss.

python benchmarks/training_memory.py          measures both, each in a process of its own: the growth of the resident
set on a CPU (Linux), the allocator's count on a GPU. Takes a minute or two on a CPU.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pspnet_fast import PSPNet, UpsampleCrossEntropyLoss

BATCH, SIZE, CLASSES = 2, 473, 150


def stock(logits: Tensor, target: Tensor) -> Tensor:
    """The loss with full-resolution logits."""
    upsampled = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(upsampled, target, ignore_index=255)


def measure(implementation: str) -> None:
    """Prints the peak of the whole process, and the time of the step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PSPNet(CLASSES).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = stock if implementation == "stock" else UpsampleCrossEntropyLoss()
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    target = torch.randint(0, CLASSES, (BATCH, SIZE, SIZE), device=device)
    start = time.perf_counter()
    outputs = model(images)
    total = loss(outputs["out"], target) + 0.4 * loss(outputs["aux"], target)
    del outputs
    total.backward()
    optimizer.step()
    value, seconds = total.item(), time.perf_counter() - start
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    print(f"{implementation:>5}: peak {peak:.2f} GB, step {seconds:.1f} s, loss {value:.6f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.manual_seed(0)
        measure(sys.argv[1])
    else:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back at once
        for name in ("stock", "fused"):
            subprocess.run([sys.executable, __file__, name], check=True, env=environment)
