"""What the settings of a configuration may be: in words, and as a test."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and what is allowed."""


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not holds:
        raise ConfigError(f"{key} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class Rule:
    """What a setting may be, in words and as a test; null passes where the type allows it."""

    allowed: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    """Numbers from ``low`` on."""
    return Rule(f"at least {low}", lambda value: low <= value)


def one_of(values: Collection[object]) -> Rule:
    """These values alone."""
    return Rule(f"one of {', '.join(map(repr, values))}", lambda value: value in values)


ABOVE_0 = Rule("above 0", lambda value: value > 0)
SHARE = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)


def check_rules(section: str, settings: Any, rules: Mapping[str, Rule]) -> None:
    """Raise ConfigError for the first field that its rule does not allow, or that is no finite number."""
    for entry in dataclasses.fields(settings):
        key, value = f"{section}.{entry.name}", getattr(settings, entry.name)
        for number in value if isinstance(value, list) else [value]:
            check(not isinstance(number, float) or math.isfinite(number), key, value, "finite")
        if key in rules and value is not None:
            check(rules[key].holds(value), key, value, rules[key].allowed)
