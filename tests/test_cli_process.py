"""The commands as processes: signals, pipes, terminals of other encodings."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_command import Workspace, run

from pspnet_fast.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = [sys.executable, "-W", "ignore", "-c", "from pspnet_fast.cli import main; main(prog_name='pspnet-fast')"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("process"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_the_whole_group(work: Workspace, tmp_path: Path, number: int, code: int) -> None:
    """As Ctrl+C in a terminal or the end of a batch job: the loading processes get it too."""
    out = tmp_path / "run"
    arguments = ["train", work.config, work.root, "train.epochs=9999", "train.workers=1", "train.log_every=1"]
    command = [*COMMAND, *map(str, arguments), "--out", str(out)]

    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True, env=ENVIRONMENT) as process:
        log = out / "log.jsonl"
        while process.poll() is None and not (log.exists() and '"iteration"' in log.read_text()):
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, errors = process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert f"interrupted by {signal.Signals(number).name}; {out / 'checkpoint.pt'} holds the state" in lines[0]
    assert "--resume" in lines[0]
    assert load_checkpoint(out / "checkpoint.pt")["step"] >= 1
    assert "train:" not in errors  # no progress bar where stderr is no terminal


def test_reader_that_has_gone(work: Workspace) -> None:
    read, write = os.pipe()
    os.close(read)
    arguments = ["eval", work.config, work.root, "--checkpoint", work.checkpoint]
    process = subprocess.run([*COMMAND, *map(str, arguments)], stdout=write, stderr=-1, text=True, env=ENVIRONMENT)
    os.close(write)
    assert process.returncode == 1
    assert process.stderr == ""


def test_terminal_without_the_letters(work: Workspace, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("rot\nstra\u00dfe\n\u9053\u8def\n", encoding="utf-8")
    result = run("train", work.config, work.root, f"data.names={names}", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    for command in (
        ["eval", work.config, work.root, f"data.names={names}", "--checkpoint", tmp_path / "run" / "best.pt"],
        ["predict", work.data / "val_0.png", "--checkpoint", tmp_path / "run" / "best.pt", "--out", tmp_path / "out"],
    ):
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "LANG": "C"}
        process = subprocess.run([*COMMAND, *map(str, command)], capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "val_0_overlay.png").exists()
