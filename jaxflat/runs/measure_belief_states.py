"""Measure how well a ridge regression on representations predicts exact posteriors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxflat.config import Config
from jaxflat.probes.ridge import Beliefs, belief_errors
from jaxflat.runs.exact_posteriors import ExactPosteriors
from jaxflat.runs.measurements import Estimates
from jaxflat.runs.probe_estimates import determination_estimate


def belief_state_determinations(
    settings: Config, local: tuple[jax.Array, ...], exact: ExactPosteriors
) -> Estimates:
    """Return R^2 of the posteriors of each name; those of one name share one regression.

    local: features_JxNxD at the words of each posterior, for train, validation and test.
    """
    estimates = {}
    for name in dict.fromkeys(exact.names):
        chosen = np.flatnonzero(np.equal(exact.names, name))
        parts = [
            _examples(features, *posterior, chosen)
            for features, posterior in zip(
                local, (exact.train, exact.validation, exact.test), strict=True
            )
        ]
        errors_DxN, spreads_N = _errors(*parts, jnp.asarray(settings.l2), len(chosen))
        estimates[f"belief_state/{name}"] = determination_estimate(errors_DxN, spreads_N)
    return estimates


def _examples(
    features_JxNxD: jax.Array, probs_JxNxC: jax.Array, valid_JxN: jax.Array, chosen_K: np.ndarray
) -> Beliefs:
    """Return the K chosen posteriors as K * N examples of one regression; draws lead all axes."""

    def rows(x: jax.Array, axis: int) -> jax.Array:
        taken = jnp.take(x, chosen_K, axis=axis)
        return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    axis = valid_JxN.ndim - 2
    return Beliefs(*(rows(x, axis) for x in (features_JxNxD, probs_JxNxC, valid_JxN)))


@partial(jax.jit, static_argnames="num_places")
def _errors(
    train: Beliefs, validation: Beliefs, test: Beliefs, l2_L: jax.Array, num_places: int
) -> tuple[jax.Array, jax.Array]:
    """Return (errors_DxN, spreads_N) of N test sentences, summed over their num_places places."""

    def of_draw(draw: Beliefs) -> tuple[jax.Array, jax.Array]:
        return belief_errors(draw, validation, test, l2_L)

    errors_DxM, spreads_DxM = jax.lax.map(of_draw, train)
    errors_DxN, spreads_DxN = (
        x.reshape(len(x), num_places, -1).sum(1) for x in (errors_DxM, spreads_DxM)
    )
    return errors_DxN, spreads_DxN[0]
