"""The examples in README.md, docs/ and configs/: blocks of Python and commands."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PEERS = ("segmentation_models_pytorch", "transformers")


def python_blocks(of_peers: bool) -> dict[str, str]:
    """FILE:LINE -> a block; those that import other people's models, or the others."""
    found = {}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if any(peer in block[1] for peer in PEERS) is of_peers:
                found[f"{path.name}:{text[: block.start()].count(chr(10)) + 1}"] = block[1]
    return found


def commands(program: str) -> dict[str, list[str]]:
    """FILE:LINE -> the arguments of a command of this program, as its line stands."""
    found = {}
    for path in [*DOCUMENTS, *sorted((ROOT / "configs").glob("*.yaml"))]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            command = re.match(rf"(?:#\s+)?{program} (.*)", line)
            if command:
                found[f"{path.name}:{number}"] = shlex.split(command[1], comments=True)
    return found
