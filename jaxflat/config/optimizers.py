"""The keys of the optimizers: a section for each, under its name."""

import inspect

from ml_collections import ConfigDict

from jaxflat.config.languages import Config

OF_OPTAX = (
    *("adabelief", "adadelta", "adagrad", "adamaxw", "adan", "amsgrad"),
    *("nadamw", "radam", "rmsprop", "signum", "yogi"),
)
"""More of optax's optimizers: those that treat each parameter by itself, so that it does not matter
that layers are stacked for a scan, and whose step is proportional to the learning rate."""


def optimizer() -> Config:
    """Return the keys of a phase's optimizer."""
    return ConfigDict(
        {
            "name": "adamw",  # which of the sections below applies
            # Steps in a row to leave out where the gradient (SAM: the first) is not finite; one
            # more ends the run, as does a compiled call of which every step was left out.
            "skip_nonfinite": 0,
            "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
            "sgd": {"momentum": 0.0},
            "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0},
            # Matrices between hidden layers by Muon, at momentum; the rest by Adam.
            "muon": {"momentum": 0.95, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0},
            # AdamW with gradients from `radius` up the slope, twice the work of a step.
            "sam": {"radius": 0.05, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
            **{name: _numbers(name) for name in OF_OPTAX},
        }
    )


def _numbers(name: str) -> dict[str, float]:
    """Return the numbers that an optimizer of optax takes, with optax's defaults; no decay."""
    import optax  # imported late: the commands parse their flags without JAX

    parameters = inspect.signature(getattr(optax, name)).parameters.values()
    numbers = {p.name: p.default for p in parameters if isinstance(p.default, float)}
    return numbers | ({"weight_decay": 0.0} if "weight_decay" in numbers else {})
