"""Declare a config key's default and bounds, and check a value against them.

A plain default declares a number above 0 (below 2^32 if whole), any text, or a tuple with at least
one item. `Bounded` declares other bounds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

Config = Any
"""A ConfigDict, or a frozen one. Its keys are attributes, which no type checker can know."""


class InputError(ValueError):
    """Unusable input; the message is one line for the user, even if it quotes several."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class Bounded:
    """A default with its own bounds, which hold for each number of a tuple. The default is allowed.

    least: the smallest allowed int. Floats: least=0 allows 0; any other number requires > 0. None:
    no lower bound. below: an upper bound, itself not allowed. choices: the allowed values, or items
    of a tuple. may_be_empty: whether () is allowed.
    """

    default: Any
    least: int | None = 1
    below: float = math.inf
    choices: tuple[Any, ...] = ()
    may_be_empty: bool = False


def defaults(section: Mapping[str, Any]) -> Config:
    """Return a new config with the defaults of all declared keys."""
    return ConfigDict({name: _default(declared) for name, declared in section.items()})


def _default(declared: Any) -> Any:
    if isinstance(declared, Mapping):
        return defaults(declared)
    return declared.default if isinstance(declared, Bounded) else declared


def check_ranges(section: Mapping[str, Any], config: Config, prefix: str = "") -> None:
    """Raise InputError if a key of the config has a value outside its declared bounds."""
    for name, declared in section.items():
        if isinstance(declared, Mapping):
            check_ranges(declared, config[name], f"{prefix}{name}.")
        else:
            bounded = declared if isinstance(declared, Bounded) else Bounded(declared)
            _check_value(f"{prefix}{name}", bounded, config[name])


def check_choices(name: str, values: Iterable[Any], choices: Iterable[Any]) -> None:
    """Raise InputError unless every value is one of the choices."""
    for value in values:
        if value not in choices:
            raise InputError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")


def _check_value(key: str, bounded: Bounded, value: Any) -> None:
    if value == bounded.default:
        return
    if bounded.choices:
        check_choices(key, value if isinstance(value, tuple) else (value,), bounded.choices)
    if value == () and not bounded.may_be_empty:
        raise InputError(f"{key}=() must name at least one")
    for number in _numbers(value):
        if not math.isfinite(number):
            raise InputError(f"{key}={value!r} must be finite")
        if isinstance(number, int) and number >= 2**32:
            raise InputError(f"{key}={value!r} must be below 2^32")
        if number >= bounded.below:
            raise InputError(f"{key}={value!r} must be below {bounded.below}")
        if bounded.least is None:
            continue
        if bounded.least == 0:
            if number < 0:
                raise InputError(f"{key}={value!r} must not be negative")
        elif number <= 0 or (isinstance(number, int) and number < bounded.least):
            least = f"at least {bounded.least}" if isinstance(number, int) else "positive"
            raise InputError(f"{key}={value!r} must be {least}")


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [] if isinstance(value, (str, bool)) or value is None else [value]
