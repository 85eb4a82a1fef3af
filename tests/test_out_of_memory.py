"""Out of memory: an error that names the operator and the bytes, in a thread too; the process goes on."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")

SCRIPT = """
import resource, sys
import torch
from pspnet_fast import ops
torch.set_num_threads(2)
ops.upsample_argmax(torch.zeros(1, 3, 2, 2), (64, 64), align_corners=True)  # starts the threads
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
call = sys.argv[1]
try:
    eval(call)
except RuntimeError as error:
    print(error)
print(float(ops.pyramid_pool(torch.ones(1, 1, 4, 4), (1,)).sum()))
"""
CALLS = [
    (
        "ops.upsample_argmax(torch.zeros(1, 3, 8, 8), (60000, 60000), align_corners=True)",
        "upsample_argmax: out of memory on the CPU: tried to allocate 3600000000 bytes (3.35 GiB) for a tensor of "
        "shape (1, 60000, 60000)",
    ),
    (
        "ops.new_concat(torch.zeros(1, 1, 1, 1), 2**32)",
        "new_concat: out of memory on the CPU: tried to allocate 17179869184 bytes (16.00 GiB) for a tensor of shape "
        "(1, 4294967296, 1, 1)",
    ),
    (
        "ops.pyramid_pool(torch.zeros(1, 1, 1, 1).expand(2, 2**20, 2**9, 2), (1,))",
        "pyramid_pool: out of memory on the CPU: tried to allocate 8589934592 bytes (8.00 GiB) for a tensor of shape "
        "(2, 1048576, 512, 2)",
    ),
    (  # in a thread
        "ops.upsample_argmax(torch.zeros(1, 1, 1, 1).expand(1, 2**26, 1, 1), (9, 9), align_corners=True)",
        "upsample_argmax: out of memory on the CPU: tried to allocate 17179869184 bytes (16.00 GiB) for what the "
        "kernel computes with",
    ),
    (  # more than a vector holds
        "ops.new_concat(torch.zeros(1, 1, 1, 1), 2**62 + 2**22)",
        "new_concat: a tensor of shape (1, 4611686018431582208, 1, 1) is too large: the number of its bytes does not "
        "fit into 64 bits",
    ),
]


@pytest.mark.parametrize("keep", [None, "0"])
@pytest.mark.parametrize(("call", "message"), CALLS)
def test_out_of_memory_names_operator_and_bytes(call, message, keep, monkeypatch):
    if keep is not None:
        monkeypatch.setenv("PSPNET_FAST_KEEP_MB", keep)
    done = subprocess.run([sys.executable, "-c", SCRIPT, call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [message, "1.0"]
