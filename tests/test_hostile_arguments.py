"""No arguments, through torch.ops either, end the process or are written outside of (hostile_arguments.py)."""

import os
import subprocess
import sys
from pathlib import Path

import hostile_arguments
import pytest
import torch
from cases import WITHOUT_TENSORS

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")


def run(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, str(HERE / "hostile_arguments.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_operator_is_tried():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pspnet_fast::")
    }
    assert registered - WITHOUT_TENSORS == set(hostile_arguments.SOUND)


def test_hostile_arguments_end_no_process():
    run()


@pytest.mark.parametrize("device", ["cuda_on_cpu"], indirect=True)
def test_hostile_arguments_end_no_process_of_the_cuda_sources(device):
    run("--cuda-on-cpu", "--pairs", "30")
