"""Measured numbers as lines on disk, and the checkpoints they are measured on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat import checkpoint, experiment, sharding
from jaxflat.config import Config
from jaxflat.flatness import Estimate, ratio_estimate

Record = dict[str, Any]


def record(step: int, measure: str, estimate: Estimate) -> Record:
    """Return an estimate as a JSON-ready record."""
    return {
        "step": step,
        "measure": measure,
        "mean": float(estimate.mean),
        "sem": float(estimate.sem),
        "num_samples": estimate.num_samples,
        "over": estimate.over,
    }


def mean_estimate(values_N: jax.Array) -> Estimate:
    """Return the mean over sentences with its standard error."""
    return ratio_estimate(values_N, jnp.ones_like(values_N), over="sentences")


def load_params(config: Config, directory: Path, step: int) -> Any:
    """Return the parameters of a measured checkpoint, on every device of the mesh."""
    mesh = experiment.make_mesh(config)
    template = sharding.replicate(mesh, experiment.init_params(config))
    return checkpoint.restore(directory / "checkpoints", step, template)
