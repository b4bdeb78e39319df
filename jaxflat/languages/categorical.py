"""Categorical distributions: random ones, draws from them, and safe normalisation."""

import jax
import jax.numpy as jnp
from jax import Array


def random_rows(key: Array, concentration: float, shape: tuple[int, ...]) -> Array:
    """Float32 probabilities along the last axis, each row a symmetric Dirichlet draw."""
    alpha_C = jnp.full(shape[-1], concentration, jnp.float32)
    return jax.random.dirichlet(key, alpha_C, shape[:-1], jnp.float32)


def draw(uniform: Array, cumulative: Array) -> Array:
    """Inverse-CDF draw from *unnormalised* cumulative weights along the last axis; int32.

    uniform (in [0, 1)) has the shape of `cumulative` without its last axis. Words of weight zero
    are never drawn unless all weights are zero.
    """
    threshold = uniform[..., None] * cumulative[..., -1:]
    index = jnp.sum(cumulative <= threshold, axis=-1, dtype=jnp.int32)
    return jnp.minimum(index, cumulative.shape[-1] - 1)


def normalize(weights: Array) -> Array:
    """weights / their sum along the last axis; rows of zeros become uniform."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 1 / weights.shape[-1])
