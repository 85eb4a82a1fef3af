"""Every example in README.md and docs/ as it stands: blocks of Python run, commands are such as the programs take."""

import re
from pathlib import Path

import cases
import click
import pytest
from documents import ROOT, commands, python_blocks
from toy_command import Workspace

from pspnet_fast.cli import main
from pspnet_fast.training.config_file import load_config

BLOCKS = python_blocks(of_peers=False)
COMMANDS = commands("pspnet-fast")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the blocks run: as if CamVid had been trained there, with a checkpoint of toy images and a photograph."""
    work = Workspace(tmp_path_factory.mktemp("toy"))
    runs = tmp_path_factory.mktemp("examples")
    (runs / "runs").mkdir()
    work.out.rename(runs / "runs" / "camvid")
    (runs / "street.jpg").write_bytes((work.data / "val_0.png").read_bytes())
    return runs


@pytest.mark.parametrize("place", BLOCKS)
def test_python_block(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(BLOCKS[place], place, "exec"), {"__name__": "__main__"})


def test_blocks_are_found() -> None:
    assert {place.split(":")[0] for place in BLOCKS} >= {"README.md", "use.md", "predict.md", "training.md"}
    assert any("FusedPSPHead(" in block for block in BLOCKS.values())
    assert {place.split(":")[0] for place in python_blocks(of_peers=True)} >= {"README.md", "fuse.md"}


def test_figures_of_the_readme_are_those_of_the_pages_it_names() -> None:
    """Each row of its table of measurements stands in the page that the row, or the one before it, links to."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.fullmatch(r"\|.*\| [\d.]+x \|.*\|", line)]
    assert len(rows) >= 6
    page = ""
    for _, *figures, told in [row if len(row) == 5 else [*row, ""] for row in rows]:
        if link := re.search(r"\((docs/\w+\.md)\)", told):
            page = (ROOT / link[1]).read_text(encoding="utf-8")
        for figure in figures:
            number = re.match(r"[\d.]+", figure)
            assert number is not None
            assert number[0] in page, figure


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_an_operator_has_the_files_that_contributing_names(operator: str) -> None:
    text = (ROOT / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"`([\w/]+/(?:\w+_)?NAME\.\w+)`", text)
    assert len(files) == 6
    for file in files:
        assert (ROOT / file.replace("NAME", operator.removesuffix("_"))).exists(), file
    assert f"def {operator}(" in (ROOT / "pspnet_fast" / "reference.py").read_text(encoding="utf-8")


def test_an_installed_package_is_tried_with_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """In `make dist`, `make test-abi` and, but for what is above the operators, `make test-arm`."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import installed_tests

    operators = {f"test_{name.removesuffix('_')}.py" for name in cases.OPERATORS}
    assert operators <= set(installed_tests.files(installed_tests.OPERATORS))
    for pattern in installed_tests.OPERATORS + installed_tests.ABOVE:
        assert installed_tests.files((pattern,)), f"{pattern} names no test"


@pytest.mark.parametrize("place", COMMANDS)
def test_command(place: str) -> None:
    """Its options exist, so do its configuration and the keys that it changes."""
    name, *arguments = COMMANDS[place]
    command = main.commands[name]
    given, unknown, _ = command.make_parser(click.Context(command)).parse_args(arguments)
    assert not unknown
    for parameter in command.params:
        assert parameter.name in given or not parameter.required
    if name in ("train", "eval"):
        keys = [override for override in given["overrides"] if override not in ("[key=value", "...]")]
        load_config(ROOT / given["config"], keys)


def test_commands_are_found() -> None:
    assert {"train", "eval", "predict", "info"} <= {arguments[0] for arguments in COMMANDS.values()}
    with pytest.raises(click.NoSuchOption):
        main.commands["eval"].make_parser(click.Context(main.commands["eval"])).parse_args(["x.yaml", "--picture", "4"])


@pytest.mark.parametrize("place", commands("make"))
def test_make_target(place: str) -> None:
    target = commands("make")[place][0]
    assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
