"""Large CPU outputs lie in memory that is kept for the next one (csrc/kept_memory.cpp)."""

import os
import subprocess
import sys

import pytest
import torch

from pspnet_fast import ops
from pspnet_fast.ops.kept_memory import nothing_kept

SHAPE = (1, 64, 256, 256)  # 16 MB in float32


@pytest.fixture
def like() -> torch.Tensor:
    return torch.ones(SHAPE)


def test_the_next_output_takes_the_memory_of_the_last(like):
    first = ops.new_concat(like, 128)
    address = first.data_ptr()
    del first
    assert ops.new_concat(like, 128).data_ptr() == address


def test_memory_in_use_is_nobody_elses(like):
    first = ops.new_concat(like, 128).fill_(1)
    view = first[:, 3:5]
    del first  # its storage lives on in the view
    second = ops.new_concat(like, 128).fill_(2)
    assert (view == 1).all()
    assert (second == 2).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_memory_format_are_those_of_the_map(like, dtype, memory_format):
    output = ops.new_concat(like.to(dtype, memory_format=memory_format), 128)
    assert output.shape == (1, 128, 256, 256)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=memory_format)


def test_a_much_smaller_output_does_not_hold_a_large_block(like):
    large = ops.new_concat(like, 256)
    address = large.data_ptr()
    del large
    assert ops.new_concat(like, 128).data_ptr() != address


def test_gradients_do_not_pass_through_it(like):
    assert not ops.new_concat(like.requires_grad_(), 128).requires_grad


@pytest.mark.usefixtures("poison")
def test_deterministic_mode_still_fills_fresh_memory(like):
    torch.use_deterministic_algorithms(False)
    block = ops.new_concat(like, 128).fill_(1)
    del block
    torch.use_deterministic_algorithms(True)
    assert ops.new_concat(like, 128).isnan().all()


RESIDENT = """
import torch
from pathlib import Path
from pspnet_fast import ops

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

like = torch.ones(1, 64, 256, 256)
before = resident()
for channels in range(64, 513, 64):  # 16 to 128 MB, 576 MB together
    ops.new_concat(like, channels).fill_(1)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
@pytest.mark.parametrize(("megabytes", "least", "most"), [(None, 200, 275), ("40", 30, 50), ("0", -1, 20)])
def test_what_is_kept_has_a_bound(megabytes, least, most):
    environment = {k: v for k, v in os.environ.items() if k != "PSPNET_FAST_KEEP_MB"}
    if megabytes is not None:
        environment["PSPNET_FAST_KEEP_MB"] = megabytes
    done = subprocess.run([sys.executable, "-c", RESIDENT], env=environment, check=True, capture_output=True, text=True)
    assert least <= float(done.stdout) <= most


BOUNDED = """
import torch
from pathlib import Path
from pspnet_fast import ops

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

like = torch.ones(1, 64, 256, 256)
before, bound = resident(), ops.keep_memory(100)
for channels in (128, 256):  # 32 and 64 MB
    ops.new_concat(like, channels).fill_(1)
print(resident() - before)
assert ops.keep_memory(40) == 100  # gives up the block of 64 MB that came last, or both
print(resident() - before)
held = ops.new_concat(like, 128).fill_(1)
assert ops.keep_memory(0) == 40
del held
print(resident() - before)
assert ops.keep_memory(bound) == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
def test_the_bound_can_be_changed_and_what_lies_beyond_is_given_back():
    done = subprocess.run([sys.executable, "-c", BOUNDED], check=True, capture_output=True, text=True)
    kept, less, nothing = map(float, done.stdout.split())
    assert 90 <= kept <= 110
    assert less <= 50
    assert nothing <= 15


@pytest.mark.parametrize("megabytes", [-1, 2**20 + 1, 2**63])
def test_a_bound_outside_its_range(megabytes):
    with pytest.raises(ValueError, match=f"megabytes must be from 0 to 1048576, but is {megabytes}"):
        ops.keep_memory(megabytes)
    if megabytes < 2**63:
        with pytest.raises(RuntimeError, match="megabytes must be from 0 to 1048576, but is"):
            torch.ops.pspnet_fast.keep_memory(megabytes)


@pytest.mark.parametrize("megabytes", [1.5, True, "1"])
def test_a_bound_that_is_no_int(megabytes):
    with pytest.raises(TypeError, match="megabytes must be an int"):
        ops.keep_memory(megabytes)


def test_nothing_is_kept_in_training_unless_the_environment_says_so(monkeypatch):
    bound = ops.keep_memory(64)
    try:
        with nothing_kept():
            assert ops.keep_memory(0) == 0
        assert ops.keep_memory(64) == 64
        monkeypatch.setenv("PSPNET_FAST_KEEP_MB", "64")
        with nothing_kept():
            assert ops.keep_memory(64) == 64
    finally:
        ops.keep_memory(bound)


FORKS = """
import os, signal, threading
import torch
from pspnet_fast import ops

torch.set_num_threads(1)
like, stop = torch.zeros(1, 64, 200, 200), False

def allocate():
    kept = []
    while not stop:
        kept.append(ops.new_concat(like, 64 + len(kept) % 7 * 16))
        if len(kept) > 3:
            kept.clear()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
statuses = set()
for _ in range(200):
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # of no time in which a busy machine would not get here
        ops.new_concat(like, 64)
        os._exit(0)
    statuses.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop = True
for thread in threads:
    thread.join()
print(statuses)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_forked_while_threads_allocate_allocates_too():
    """The child would wait for ever for a lock that a thread of its parent held; its alarm ends it."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "{0}"


THREADS = """
import random, threading
import torch
from pathlib import Path
from pspnet_fast import ops

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
like = torch.zeros(1, 8, 100, 100)

def allocate(seed, count):
    choice = random.Random(seed)
    for _ in range(count):
        ops.new_concat(like, choice.randint(210, 900))[:, :, ::10].fill_(1)  # 8 to 34 MB

def run(count):
    threads = [threading.Thread(target=allocate, args=(seed, count)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

before = resident()
run(25)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")
@pytest.mark.parametrize(("megabytes", "least", "most"), [(None, 100, 275), ("40", 10, 60)])
def test_what_threads_leave_behind_has_the_same_bound(megabytes, least, most):
    environment = {k: v for k, v in os.environ.items() if k != "PSPNET_FAST_KEEP_MB"}
    if megabytes is not None:
        environment["PSPNET_FAST_KEEP_MB"] = megabytes
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, check=True, capture_output=True, text=True)
    assert least <= float(done.stdout) <= most
