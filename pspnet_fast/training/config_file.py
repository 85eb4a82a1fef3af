"""Reading a configuration: a YAML file and ``key=value`` overrides, each value typed by its field.

YAML tells types by looks: 010 is 8 to it, 2024_01 is 202401, 1:30 is 90, on is true. Here a scalar is the text that it
is written as until its field says what it has to be.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pspnet_fast.data.lists import read_text
from pspnet_fast.training.config import Config
from pspnet_fast.training.config_rules import ConfigError

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)")
_TRUE, _FALSE = ("true", "on", "yes", "1"), ("false", "off", "no", "0")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file over the defaults, then apply ``key=value`` overrides such as ``train.lr=0.02``.

    An override's value is text as it stands where the field is text, else YAML. It replaces the file's;
    ``KEY.ENTRY=...`` adds to a mapping.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: the file is no YAML mapping, a key is unknown (the message names one that is near, or lists those
            there are), a value has the wrong type or lies outside its range.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    given = _typed_settings(_parse(text, str(path)), str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"an override must be key=value, got {override!r}")
        value = text if _types().get(key) is str else _parse(text, key)
        for part in reversed(key.split(".")):
            value = {part: value}
        for name, new in _typed_settings(value, "command line").items():
            given[name] = given.get(name, {}) | new if key.startswith(f"{name}.") else new
    sections = {section.name: section.type for section in dataclasses.fields(Config)}
    values: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for key, value in given.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return Config(**{section: kind(**values[section]) for section, kind in sections.items()})  # type: ignore[operator]


def _parse(text: str, source: str) -> Any:
    """YAML whose scalars are texts or None."""
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, form) for tag, form in resolvers if tag.endswith((":null", ":merge"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            if repeated := [key for key in keys if keys.count(key) > 1]:
                raise yaml.constructor.ConstructorError(None, None, f"{repeated[0]!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{source}: no valid YAML: {line}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: no valid YAML: {' '.join(str(error).split())}") from None


def _typed_settings(document: Any, source: str) -> dict[str, Any]:
    """Values by key, of a mapping of sections; unknown keys are refused, and what does not fit the field's type."""
    if not isinstance(document := {} if document is None else document, Mapping):
        raise ConfigError(f"{source}: must be a mapping with the keys model, data and train")
    types, settings = _types(), {}
    sections = {key.partition(".")[0] for key in types}
    for section, values in document.items():
        if section in sections and not isinstance(values, Mapping):
            raise ConfigError(f"{source}: {section} must be a mapping, got {values!r}")
        entries = values.items() if isinstance(values, Mapping) else [("", values)]
        for name, value in entries:
            key = f"{section}.{name}".removesuffix(".")
            if key not in types:
                raise ConfigError(f"{source}: unknown key {key!r}; {_instead(key, types)}")
            try:
                settings[key] = _typed(types[key], value)
            except ValueError as error:
                raise ConfigError(f"{source}: {key} must be {_name(types[key])}, got {value!r}{error}") from None
    return settings


def _typed(kind: Any, value: Any) -> Any:
    """The value that a field of this type has by this text, list or mapping of texts.

    Raises:
        ValueError: it is none; the message may be advice, which follows a semicolon.
    """
    if get_origin(kind) is UnionType:  # with None
        return None if value is None else _typed(get_args(kind)[0], value)
    if get_origin(kind) is list and isinstance(value, list):
        return [_typed(get_args(kind)[0], entry) for entry in value]
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return {_whole(key): _whole(entry) for key, entry in value.items()}
    if isinstance(value, str):
        if kind is str:
            return value
        if kind is bool and value.lower() in (*_TRUE, *_FALSE):
            return value.lower() in _TRUE
        if kind is int and _INT.fullmatch(value):
            return int(value)
        if kind is float and _FLOAT.fullmatch(value.lower()):
            return float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
        raise ValueError(_advice(kind, value))
    raise ValueError("")


def _whole(value: Any) -> Any:
    """A text that is a whole number as that number."""
    return int(value) if isinstance(value, str) and _INT.fullmatch(value) else value


def _advice(kind: type, text: str) -> str:
    """How a number is written that other languages read: 010, 1_000, 1e3 for a whole one."""
    try:
        number = float(text) if kind in (int, float) else math.nan
    except ValueError:
        return ""
    if number.is_integer():
        return f"; write {int(number)}"
    return f"; write {number}" if kind is float and math.isfinite(number) else ""


def _name(kind: Any) -> str:
    if get_origin(kind) is dict:
        return 'a mapping, with blanks and on a command line in quotes: "{0: 0, 255: 1}"'
    return str(getattr(kind, "__name__", kind) if get_origin(kind) is None else kind)


def _types() -> dict[str, Any]:
    """Type of each setting by its key."""
    return {
        f"{section.name}.{entry.name}": entry.type
        for section in dataclasses.fields(Config)
        for entry in dataclasses.fields(section.type)  # type: ignore[arg-type]
    }


def _instead(key: str, valid: Collection[str]) -> str:
    """What could be meant by an unknown key: one that is near, else all there are in its section."""
    section, _, name = key.rpartition(".")
    names: dict[str, list[str]] = {}
    for other in valid:
        names.setdefault(other.partition(".")[0], []).append(other.partition(".")[2])
    near_section = difflib.get_close_matches(section, names, n=1)
    if near_section:
        near = difflib.get_close_matches(name, names[near_section[0]], n=1)
        if near or section != near_section[0]:
            return f"the nearest valid key is '{near_section[0]}.{near[0] if near else '...'}'"
    if elsewhere := [other for other in valid if other.endswith(f".{name}")]:
        return f"the nearest valid key is {elsewhere[0]!r}"
    if near_section:
        return f"{section} has the keys {', '.join(names[section])}"
    return f"the keys are {', '.join(f'{other}.*' for other in names)}; --print-config lists them"
