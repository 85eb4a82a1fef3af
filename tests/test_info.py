"""pspnet_fast.info and `pspnet-fast info`."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from pspnet_fast import __version__, info
from pspnet_fast.cli import main


def test_facts() -> None:
    facts = info.collect()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["built"]["cpu"][0] == "baseline"
    assert facts["machine"]["cpu_kernels"] in facts["built"]["cpu"]
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert len(facts["machine"]["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert not facts["machine"]["cuda_kernels"] or (facts["built"]["cuda"] and facts["machine"]["gpus"])


def test_text() -> None:
    facts = info.collect()
    facts["built"] |= {"cuda": None, "cuda_architectures": None}
    facts["machine"] |= {"gpus": [], "cpu_kernels": "AVX2", "threads": 3}
    text = info.format(facts)
    assert f"torch {torch.__version__}, Python {platform.python_version()}" in text
    assert "running AVX2, 3 threads" in text
    assert "CUDA kernels  not built" in text
    assert "none visible" in text
    facts["built"] |= {"cuda": "13.0", "cuda_architectures": "9.0 12.0+PTX"}
    facts["machine"]["gpus"] = ["Card A", "Card B"]
    text = info.format(facts)
    assert "CUDA 13.0 for 9.0 12.0+PTX" in text
    assert "Card A, Card B" in text


def test_command() -> None:
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0
    assert result.output.strip() == info.format(info.collect())
    assert json.loads(CliRunner().invoke(main, ["info", "--json"]).output) == info.collect()


@pytest.mark.parametrize("option", ["--version", "info"])
def test_version_and_the_package_as_a_program(option: str) -> None:
    command = [sys.executable, "-m", "pspnet_fast", option]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = CliRunner().invoke(main, [option])
    assert done.stdout == result.output
    assert option != "--version" or result.output == f"pspnet_fast {__version__}\n"
