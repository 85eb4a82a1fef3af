"""Peak memory and processor time of the Dice and Lovasz-softmax losses, beside compositions of upsampled logits.

PYTHONPATH=.:tests python benchmarks/region_losses.py   forward and backward on one thread of a CPU (Linux), each in a
process of its own: 2 images, 150 classes of which 30 occur, 60x60 to 473x473. Takes a minute.
"""

import resource
import subprocess
import sys
import time

import torch
from test_region_losses import LOSSES, composed


def measure(name: str, implementation: str) -> None:
    """Prints by how much the resident set grew at most, and the seconds of processor time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits, target = torch.randn(2, 150, 60, 60, requires_grad=True), torch.randint(0, 30, (2, 473, 473))
    LOSSES[name]()(logits[:1, :, :4, :4], target[:1, :9, :9]).backward()  # what a first call loads
    before, start = peak(), time.process_time()
    loss = LOSSES[name]()(logits, target) if implementation == "ours" else composed(name, logits, target, True)
    loss.backward()
    seconds = time.process_time() - start
    print(f"{name:>6}, {implementation:>8}: {peak() - before:6.0f} MB, {seconds:5.1f} s, loss {loss.item():.6f}")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(*sys.argv[1:])
    else:
        for name in LOSSES:
            for implementation in ("ours", "composed"):
                subprocess.run([sys.executable, __file__, name, implementation], check=True)
