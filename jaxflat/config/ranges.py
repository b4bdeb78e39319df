"""The allowed values of config keys, by the names of the keys."""

import math
from collections.abc import Iterable
from typing import Any

from jaxflat import config as base_config


class InputError(ValueError):
    """Unusable input. The message is one line, even if the input it quotes has several."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def check_choices(name: str, values: Iterable[Any], choices: Iterable[Any]) -> None:
    """Raise InputError unless every value is one of the choices."""
    for value in values:
        if value not in choices:
            raise InputError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")


CHOICES = {
    "targets": ("exact", "sampled"),
    "language.masking": ("one", "share"),
    "model.name": ("transformer", "lstm", "lookup_table"),
    "model.features": ("p", "log_p"),
    "flatness.labels": ("exact", "model", "data"),
    "flatness.measures": base_config.MEASURES,
    "probes.pooling": ("concatenate", "mean"),
    "finetune.pooling": ("concatenate", "mean", "cls"),
    "probes.labelings": ("map", "latent", "official"),
    "adversary.labeling": ("map", "latent", "official"),
}
MAY_BE_ZERO = (
    *("seed", "warmup_steps", "projected_dimension", "finetune.shots", "strength"),
    *("decay_steps", "anneal_steps", "momentum", "weight_decay", "b1", "tasks", "num_positions"),
    *("embedded_width", "embedded_layers", "stored_sentences", "emission_probability"),
    *("num_largest", "num_smallest", "num_burnin", "localization", "relative_error"),
    *("eps_root", "initial_scale", "initial_accumulator_value", "skip_nonfinite"),
    *(".beta", ".decay", ".rho"),
)
MAY_BE_EMPTY = ("phase_order", "checkpoint_steps")
BELOW_ONE = ("b1", "b2", "b3", "momentum", ".beta", ".decay", ".rho")
AT_LEAST_TWO = ("num_microbatches", "num_sentences", "num_test", "num_validation", "num_chains")


def check_range(key: str, value: Any) -> None:
    """Raise InputError if the value of a dotted key is not among its choices or out of range."""
    for name, choices in CHOICES.items():
        if key == name or key.endswith(f".{name}"):
            check_choices(key, value if isinstance(value, tuple) else (value,), choices)
    if key == "mesh.data" and value == -1:
        return
    if value == () and not key.endswith(MAY_BE_EMPTY):
        raise InputError(f"{key}=() must name at least one")
    lowest = 2 if key.endswith(AT_LEAST_TWO) else 1
    for number in _numbers(value):
        if not math.isfinite(number):
            raise InputError(f"{key}={value!r} must be finite")
        if isinstance(number, int) and number >= 2**32:
            raise InputError(f"{key}={value!r} must be below 2^32")
        if key.endswith(BELOW_ONE) and number >= 1:
            raise InputError(f"{key}={value!r} must be below 1")
        if key.endswith(MAY_BE_ZERO):
            if number < 0:
                raise InputError(f"{key}={value!r} must not be negative")
        elif number <= 0 or (isinstance(number, int) and number < lowest):
            least = f"at least {lowest}" if isinstance(number, int) else "positive"
            raise InputError(f"{key}={value!r} must be {least}")


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [] if isinstance(value, (str, bool)) or value is None else [value]
