"""Standard errors of probe results, over test sentences and draws of training sentences."""

import jax
import jax.numpy as jnp

from jaxflat.flatness import Estimate, ratio_estimate


@jax.jit
def accuracy_estimate(correct_DxN: jax.Array, valid_N: jax.Array) -> Estimate:
    """Return the mean accuracy over valid test sentences and D draws of training sentences."""
    return _over_draws((correct_DxN & valid_N[None]).astype(jnp.float32), valid_N)


@jax.jit
def determination_estimate(errors_DxN: jax.Array, spreads_N: jax.Array) -> Estimate:
    """Return R^2 = 1 - sum |p - phat|^2 / sum |p - mean p|^2, the mean over D draws.

    Its standard error is the error of a ratio, to first order. The spreads are distances from the
    test mean of p. This mean minimizes their sum, so its own error adds nothing.
    """
    unexplained = _over_draws(errors_DxN, spreads_N)
    return Estimate(
        1 - unexplained.mean, unexplained.sem, unexplained.num_samples, unexplained.over
    )


def _over_draws(sums_DxN: jax.Array, weights_N: jax.Array) -> Estimate:
    """Return the mean over draws of sum_n(sums) / sum_n(weights).

    SEM^2 = (variance over sentences) / N + (variance over draws) / D.
    """
    over_sentences = ratio_estimate(sums_DxN.mean(0), weights_N, over="sentences")
    num_draws = len(sums_DxN)
    if num_draws == 1:
        return over_sentences
    ratios_D = sums_DxN.sum(1) / weights_N.sum().astype(sums_DxN.dtype)
    sem = jnp.sqrt(over_sentences.sem**2 + ratios_D.var(ddof=1) / num_draws)
    return Estimate(over_sentences.mean, sem, num_draws, "draws+sentences")
