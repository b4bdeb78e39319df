"""Turn the representations of a sentence's tokens into the features that a probe sees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def sentence_features(
    apply_fn: Callable[..., Any],
    params: Any,
    tokens_NxT: jax.Array,
    lengths_N: jax.Array,
    pooling: str,
) -> jax.Array:
    """Return features_NxF of unmasked sentences: of the CLS token for "cls", else by `pool`."""
    _, intermediates = apply_fn({"params": params}, tokens_NxT, lengths_N)
    if pooling == "cls":
        return intermediates["cls_BxD"]
    return pool(intermediates["features_BxMxD"], lengths_N, pooling)


def pool(features_NxTxD: jax.Array, lengths_N: jax.Array, pooling: str) -> jax.Array:
    """Return features_NxF: F = T * D with 0 at padding for "concatenate", F = D otherwise.

    "mean" is over the words; "last" takes the last word.
    """
    num_positions = features_NxTxD.shape[1]
    if pooling == "last":
        last_Nx1x1 = (lengths_N - 1)[:, None, None]
        return jnp.take_along_axis(features_NxTxD, last_Nx1x1, axis=1)[:, 0]
    if pooling == "mean":
        return span_mean(features_NxTxD, lengths_N, (0, num_positions))
    inside_NxT = _inside(lengths_N, num_positions, (0, num_positions))
    return jnp.where(inside_NxT[:, :, None], features_NxTxD, 0).reshape(len(lengths_N), -1)


def span_mean(features_NxTxD: jax.Array, lengths_N: jax.Array, span: tuple[int, int]) -> jax.Array:
    """Return features_NxD, the mean over words span[0] <= t < span[1]; 0 for an empty span."""
    inside_NxT = _inside(lengths_N, features_NxTxD.shape[1], span)
    sums_NxD = jnp.where(inside_NxT[:, :, None], features_NxTxD, 0).sum(1)
    num_words_N = jnp.maximum(inside_NxT.sum(1, dtype=lengths_N.dtype), 1)
    return sums_NxD / num_words_N[:, None].astype(features_NxTxD.dtype)


def random_projection(key: jax.Array, num_features: int, dimension: int) -> jax.Array:
    """Return a random matrix_FxP with orthonormal columns or, if F < P, orthonormal rows.

    It maps features of any width to P dimensions. For F <= P it preserves distances. For F > P it
    projects on a uniformly random P-dimensional subspace.
    """
    orthonormal = jax.nn.initializers.orthogonal()
    return orthonormal(key, (num_features, dimension), jnp.float32)


def _inside(lengths_N: jax.Array, num_positions: int, span: tuple[int, int]) -> jax.Array:
    positions_1xT = jnp.arange(num_positions, dtype=lengths_N.dtype)[None, :]
    return (
        (positions_1xT < lengths_N[:, None])
        & (span[0] <= positions_1xT)
        & (positions_1xT < span[1])
    )
