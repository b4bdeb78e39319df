"""What a probe sees of a sentence: the concatenated representations of its tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def token_features(
    apply_fn: Callable[..., Any], params: Any, tokens_NxT: jax.Array, lengths_N: jax.Array
) -> jax.Array:
    """Return features_NxF, F = T * D: the unmasked sentence's representations, 0 at padding."""
    _, intermediates = apply_fn({"params": params}, tokens_NxT, lengths_N)
    return concatenate_positions(intermediates["features_BxMxD"], lengths_N)


def concatenate_positions(features_NxTxD: jax.Array, lengths_N: jax.Array) -> jax.Array:
    """Return features_NxF with the positions beyond each sentence's length set to 0."""
    words_NxT = jnp.arange(features_NxTxD.shape[1])[None, :] < lengths_N[:, None]
    return jnp.where(words_NxT[:, :, None], features_NxTxD, 0).reshape(len(lengths_N), -1)
