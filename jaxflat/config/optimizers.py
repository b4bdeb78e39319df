"""The keys of the optimizers: one section per optimizer, under its name."""

import inspect

import optax
from ml_collections import ConfigDict

from jaxflat.config.languages import Config

OF_OPTAX = (
    *("adabelief", "adadelta", "adagrad", "adamaxw", "adan", "amsgrad"),
    *("nadamw", "radam", "rmsprop", "signum", "yogi"),
)
"""Further optimizers of optax. Each treats every parameter by itself, so that stacking layers for a
scan changes nothing. Each has steps proportional to the learning rate."""


def optimizer() -> Config:
    """Return the keys of a phase's optimizer."""
    return ConfigDict(
        {
            "name": "adamw",  # which of the sections below applies
            # Skip at most this many consecutive steps if the gradient (SAM: the first) is not
            # finite. One more ends the run; so does a compiled call that skips all its steps.
            "skip_nonfinite": 0,
            "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
            "sgd": {"momentum": 0.0},
            "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0},
            # Muon with `momentum` for matrices between hidden layers; Adam for the rest.
            "muon": {"momentum": 0.95, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0},
            # AdamW with gradients taken `radius` up the slope; a step costs twice as much.
            "sam": {"radius": 0.05, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
            **{name: _numbers(name) for name in OF_OPTAX},
        }
    )


def _numbers(name: str) -> dict[str, float]:
    """Return optax's float arguments of an optimizer and their defaults; weight_decay is 0."""
    parameters = inspect.signature(getattr(optax, name)).parameters.values()
    numbers = {p.name: p.default for p in parameters if isinstance(p.default, float)}
    return numbers | ({"weight_decay": 0.0} if "weight_decay" in numbers else {})
