"""The config keys of the optimizers: one section per optimizer, under its name."""

import inspect
from typing import Any

from jaxflat.config.ranges import Bounded

OF_OPTAX = (
    *("adabelief", "adadelta", "adagrad", "adamaxw", "adan", "amsgrad"),
    *("nadamw", "radam", "rmsprop", "signum", "yogi"),
)
"""More optimizers of optax. Each treats every parameter by itself, so layers can be stacked for a
scan, and its step is proportional to the learning rate."""

BOUNDS: dict[str, dict[str, Any]] = {
    **{key: {"least": 0, "below": 1} for key in ("b1", "beta", "decay", "momentum", "rho")},
    **{key: {"below": 1} for key in ("b2", "b3")},
    **{key: {"least": 0} for key in ("eps_root", "initial_accumulator_value", "initial_scale")},
    "weight_decay": {"least": 0},
}
"""The bounds of keys, by their names, which mean the same in every optimizer."""


def optimizer() -> dict[str, Any]:
    """Return the keys of a phase's optimizer, with their bounds."""
    sections = {
        "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        "sgd": {"momentum": 0.0},
        "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0},
        # Muon, at `momentum`, for the matrices between hidden layers; Adam for the rest.
        "muon": {"momentum": 0.95, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0},
        # AdamW with the gradient at a distance `radius` up the slope: a step costs twice as much.
        "sam": {"radius": 0.05, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        **{name: _numbers(name) for name in OF_OPTAX},
    }
    return {
        "name": "adamw",  # the section that applies
        # Skip up to this many consecutive steps with a gradient (SAM: the first) that is not
        # finite. One more ends the run, and so does a compiled call without any other step.
        "skip_nonfinite": Bounded(0, least=0),
        **{
            name: {key: Bounded(default, **BOUNDS.get(key, {})) for key, default in section.items()}
            for name, section in sections.items()
        },
    }


def _numbers(name: str) -> dict[str, float]:
    """Return the float keywords of an optimizer of optax with optax's defaults; weight_decay 0."""
    import optax  # imported late: the commands parse their flags without JAX

    parameters = inspect.signature(getattr(optax, name)).parameters.values()
    numbers = {p.name: p.default for p in parameters if isinstance(p.default, float)}
    return numbers | ({"weight_decay": 0.0} if "weight_decay" in numbers else {})
