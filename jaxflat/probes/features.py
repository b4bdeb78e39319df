"""What a probe sees of a sentence: the representations of its tokens, together."""

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
    """Return features_NxF of the unmasked sentences, see `pool`."""
    _, intermediates = apply_fn({"params": params}, tokens_NxT, lengths_N)
    return pool(intermediates["features_BxMxD"], lengths_N, pooling)


def pool(features_NxTxD: jax.Array, lengths_N: jax.Array, pooling: str) -> jax.Array:
    """Return features_NxF of the words: F = T * D for "concatenate", 0 at padding; D for "mean"."""
    positions_T = jnp.arange(features_NxTxD.shape[1], dtype=lengths_N.dtype)
    words_NxT = positions_T[None, :] < lengths_N[:, None]
    features_NxTxD = jnp.where(words_NxT[:, :, None], features_NxTxD, 0)
    if pooling == "mean":
        return features_NxTxD.sum(1) / lengths_N[:, None].astype(features_NxTxD.dtype)
    return features_NxTxD.reshape(len(lengths_N), -1)
