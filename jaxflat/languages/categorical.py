"""Categorical distributions: make random ones, normalise them, and draw from them.

Alias tables give draws in constant time: Walker, "An efficient method for generating discrete
random variables with general distributions" (1977), with the tables of Vose (1991).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def random_rows(key: Array, concentration: float, shape: tuple[int, ...]) -> Array:
    """Return float32 probabilities along the last axis, each row a symmetric Dirichlet draw."""
    alpha_C = jnp.full(shape[-1], concentration, jnp.float32)
    return jax.random.dirichlet(key, alpha_C, shape[:-1], jnp.float32)


def draw(uniform: Array, cumulative: Array) -> Array:
    """Draw int32 outcomes by the inverse of *unnormalised* cumulative weights on the last axis.

    uniform (in [0, 1)) has the shape of `cumulative` without its last axis. An outcome of weight
    zero is never drawn unless all weights are zero.
    """
    threshold = uniform[..., None] * cumulative[..., -1:]
    index = jnp.sum(cumulative <= threshold, axis=-1, dtype=jnp.int32)
    return jnp.minimum(index, cumulative.shape[-1] - 1)


def normalize(weights: Array) -> Array:
    """Return weights divided by their sum along the last axis; rows of zeros become uniform."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 1 / weights.shape[-1])


def alias_table(weights_RxC: np.ndarray) -> np.ndarray:
    """Return the table of R distributions over C outcomes, RxM uint32, M = 2^m >= C.

    In column c of a row, the high 32 - m bits hold the probability of outcome c in that column. The
    low m bits hold the other outcome, its alias. Weights need not sum to 1. Probabilities are
    rounded to 2^-32. Outcomes of weight 0 have probability 0, except in a row of zeros.
    """
    bits = max(1, (weights_RxC.shape[1] - 1).bit_length())
    M = 2**bits
    table_RxM = np.empty((len(weights_RxC), M), np.uint32)
    for row, weights_C in enumerate(np.asarray(weights_RxC, np.float64)):
        shares = np.zeros(M)
        shares[: len(weights_C)] = weights_C / (weights_C.sum() or 1) * M
        keep_M, alias_M = _shares(shares.tolist(), int(shares.argmax()))
        scaled_M = np.minimum(np.round(np.array(keep_M) * 2 ** (32 - bits)), 2 ** (32 - bits) - 1)
        table_RxM[row] = (scaled_M.astype(np.uint32) << bits) | np.array(alias_M, np.uint32)
    return table_RxM


def _shares(shares: list[float], heaviest: int) -> tuple[list[float], list[int]]:
    """Return (keep, alias): outcome c gets the share keep[c] of column c, and alias[c] the rest.

    shares sum to the number of columns M.
    """
    keep, alias = [1.0] * len(shares), list(range(len(shares)))
    small = [c for c, share in enumerate(shares) if share < 1]
    large = [c for c, share in enumerate(shares) if share >= 1]
    while small and large:
        poor, rich = small.pop(), large[-1]
        keep[poor], alias[poor] = shares[poor], rich
        shares[rich] -= 1 - shares[poor]
        if shares[rich] < 1:
            small.append(large.pop())
    for poor in small:  # their shares are 1 up to rounding, but a share of 0 must stay 0
        if shares[poor] == 0:
            keep[poor], alias[poor] = 0.0, heaviest
    return keep, alias


def draw_alias(bits: Array, table_RxM: Array, row: Array) -> Array:
    """Return int32 outcomes of distributions `row`, by uniform uint32 bits of the same shape."""
    M = table_RxM.shape[1]
    m = M.bit_length() - 1
    column = bits >> jnp.uint32(32 - m)
    flat = row * M + column.astype(jnp.int32)
    entry = table_RxM.reshape(-1).at[flat].get(mode="promise_in_bounds")
    kept = (bits & jnp.uint32(2 ** (32 - m) - 1)) < (entry >> jnp.uint32(m))
    return jnp.where(kept, column, entry & jnp.uint32(M - 1)).astype(jnp.int32)
