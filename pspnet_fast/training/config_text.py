"""A configuration as a YAML file with meanings and allowed values."""

import ast
import dataclasses
import inspect
import re

from pspnet_fast.training.config import RULES, Config


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that :func:`load_config` reads, with meanings and allowed values as comments."""
    import yaml  # type: ignore[import-untyped]

    lines = []
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        meanings = _meanings(type(settings))
        lines.append(f"{section.name}:  # {_plain(type(settings).__doc__ or '')}")
        for entry in dataclasses.fields(settings):
            kind = entry.type if isinstance(entry.type, str) else getattr(entry.type, "__name__", "")
            kind = (
                (str(entry.type) if "[" in str(entry.type) or not kind else kind)
                .replace("None", "null")
                .replace("typing.", "")
            )
            kind = kind.replace("typing.", "")
            rule = RULES.get(f"{section.name}.{entry.name}")
            comment = f"{kind}, {rule.allowed}" if rule else kind
            value = yaml.safe_dump(getattr(settings, entry.name), default_flow_style=True, width=10**6)
            lines.append(f"  # {_plain(meanings.get(entry.name, ''))} ({comment})")
            lines.append(f"  {entry.name}: {value.removesuffix(chr(10)).removesuffix('...').rstrip()}")
    return "\n".join(lines) + "\n"


def _plain(docstring: str) -> str:
    """One line without markup."""
    return " ".join(re.sub(r":\w+:|`", "", docstring).split())


def _meanings(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for line, below in zip(body.body, body.body[1:], strict=False):
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, str):
            found[line.target.id] = text
    return found
