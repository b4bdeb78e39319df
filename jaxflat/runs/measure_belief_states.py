"""Measure how well a ridge regression on representations predicts exact posteriors."""

import jax
import jax.numpy as jnp

from jaxflat.config import Config
from jaxflat.probes.ridge import Beliefs, belief_errors
from jaxflat.runs.measurements import Estimates
from jaxflat.runs.probe_estimates import determination_estimate
from jaxflat.runs.probe_sets import ExactPosteriors


def belief_state_determinations(
    settings: Config, local: tuple[jax.Array, ...], exact: ExactPosteriors
) -> Estimates:
    """Return R^2 of each of J tasks.

    local: features_JxNxD at the words of each task's symbol, for train, validation and test.
    """
    parts = [
        Beliefs(features, *part)
        for features, part in zip(local, (exact.train, exact.validation, exact.test), strict=True)
    ]
    errors_DxJxN, spreads_DxJxN = _errors(*parts, jnp.asarray(settings.l2))
    return {
        f"belief_state/{name}": determination_estimate(errors_DxJxN[:, j], spreads_DxJxN[0, j])
        for j, name in enumerate(exact.names)
    }


@jax.jit
def _errors(
    train: Beliefs, validation: Beliefs, test: Beliefs, l2_L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (errors_DxJxN, spreads_DxJxN) for all draws and tasks."""

    def of_draw(draw: Beliefs) -> tuple[jax.Array, jax.Array]:
        def of_task(parts: tuple[Beliefs, Beliefs, Beliefs]) -> tuple[jax.Array, jax.Array]:
            return belief_errors(*parts, l2_L)

        return jax.lax.map(of_task, (draw, validation, test))

    return jax.lax.map(of_draw, train)
