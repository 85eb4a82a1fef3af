"""The commands on a toy data set, for the tests of the command line."""

from pathlib import Path

from click.testing import CliRunner, Result
from toy_data import write_toy_data

from pspnet_fast.cli import main

CONFIG = """
model: {backbone: resnet18, stem: conv7, output_stride: 16, bins: [1, 2], head_channels: 8}
data: {crop: [33, 33], scale: [0.9, 1.1], mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
train: {epochs: 1, batch_size: 4, workers: 0, device: cpu}
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Workspace:
    """A data set, a configuration, and the run that was trained from them."""

    def __init__(self, folder: Path) -> None:
        self.data = write_toy_data(folder / "data")
        self.root = f"data.root={self.data}"
        self.config = folder / "toy.yaml"
        self.config.write_text(CONFIG)
        self.out = folder / "run"
        self.checkpoint = self.out / "checkpoint.pt"
        self.trained = run("train", self.config, self.root, "--out", self.out)


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """The command failed with this exit code and one line that holds all the parts."""
    assert result.exit_code == code, result.output
    error = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1
    assert "Traceback" not in result.output
    for part in parts:
        assert part in error[0]
