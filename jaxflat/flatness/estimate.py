"""A measured number with its standard error, and the kind of sample that the error covers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from scipy import stats

Over = Literal[
    "probes",
    "sentences",
    "probes+sentences",
    "draws+sentences",
    "chains",
    "documents",
    "seeds",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, from `num_samples` independent samples.

    mean and sem: scalars, or arrays of one shape. over: what one sample is. Numbers without a
    standard error have sem nan: R-hat, effective sample sizes, residuals of eigenvalues, and means
    of a single sample.
    """

    mean: jax.Array
    sem: jax.Array
    num_samples: int = field(metadata={"static": True})
    over: Over = field(metadata={"static": True})

    def interval(self, level: float = 0.95) -> tuple[jax.Array, jax.Array]:
        """Return the Student-t interval: mean +- t(1 - (1 - level) / 2, num_samples - 1) * sem."""
        quantile = float(stats.t.ppf(1 - (1 - level) / 2, self.num_samples - 1))
        return self.mean - quantile * self.sem, self.mean + quantile * self.sem


@partial(jax.jit, static_argnames="over")
def ratio_estimate(sums_n: jax.Array, weights_n: jax.Array, over: Over) -> Estimate:
    """Return R = sum(s) / sum(w) over n independent pairs, with the linearised error of a ratio.

    sums_n: s. weights_n: w. over: what a pair is a sample of, see `Estimate`.

    SEM = sqrt(n / (n - 1) * sum((s_i - R w_i)^2)) / |sum(w)|  (Cochran, Sampling Techniques, 2.11).
    With equal weights this is the ordinary standard error of the mean. With unequal weights R has
    a bias of order 1/n. The sum of the weights may be negative. A single sample has SEM nan.
    """
    num_samples = sums_n.shape[0]
    weights_n = weights_n.astype(sums_n.dtype)
    total_weight = weights_n.sum()
    mean = sums_n.sum() / total_weight
    if num_samples == 1:
        return Estimate(mean, jnp.full_like(mean, jnp.nan), num_samples, over)
    squared_residuals = jnp.sum((sums_n - mean * weights_n) ** 2)
    sem = jnp.sqrt(num_samples / (num_samples - 1) * squared_residuals) / jnp.abs(total_weight)
    return Estimate(mean, sem, num_samples, over)
