"""Exact draws from many categorical distributions in constant time, by alias tables.

Walker, "An efficient method for generating discrete random variables with general distributions"
(1977), with the tables of Vose (1991).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array


def alias_table(weights_RxC: np.ndarray) -> np.ndarray:
    """Return the table of R distributions over C outcomes, RxM uint32, M = 2^m >= C.

    Column c of a row holds, in the high 32 - m bits, the chance that c keeps its share, and in the
    low m bits the outcome that has the rest. Weights need not sum to 1; probabilities are rounded
    to 2^-32, those of weight 0 are 0, and a row of zeros draws whatever.
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
    """(keep, alias): outcome c has keep[c] of column c, alias[c] the rest; shares sum to M."""
    keep, alias = [1.0] * len(shares), list(range(len(shares)))
    small = [c for c, share in enumerate(shares) if share < 1]
    large = [c for c, share in enumerate(shares) if share >= 1]
    while small and large:
        poor, rich = small.pop(), large[-1]
        keep[poor], alias[poor] = shares[poor], rich
        shares[rich] -= 1 - shares[poor]
        if shares[rich] < 1:
            small.append(large.pop())
    for poor in small:  # of share 1 but for rounding; a share of 0 must stay one
        if shares[poor] == 0:
            keep[poor], alias[poor] = 0.0, heaviest
    return keep, alias


def draw_alias(bits: Array, table_RxM: Array, row: Array) -> Array:
    """Return outcomes, int32, of distributions `row`, by uniform uint32 bits of the same shape."""
    M = table_RxM.shape[1]
    m = M.bit_length() - 1
    column = bits >> jnp.uint32(32 - m)
    flat = row * M + column.astype(jnp.int32)
    entry = table_RxM.reshape(-1).at[flat].get(mode="promise_in_bounds")
    kept = (bits & jnp.uint32(2 ** (32 - m) - 1)) < (entry >> jnp.uint32(m))
    return jnp.where(kept, column, entry & jnp.uint32(M - 1)).astype(jnp.int32)
