"""A batch of sentences, and the probability of each word under each symbol that may emit it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import normalize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sentences:
    """A batch of sentences.

    tokens_BxT: int32 words 0..V-1, then the pad V from position lengths_B on.
    lengths_B: int32 numbers of words.
    latents: the language's hidden variables (states, tree nodes), a pytree with leading axis B.
    """

    tokens_BxT: Array
    lengths_B: Array
    latents: Any


def mask_id(num_words: int) -> int:
    """Return the token of a hidden word, V + 1; words are 0..V-1 and the pad is V."""
    return num_words + 1


def is_word(lengths_B: Array, T: int) -> Array:
    """Return words_BxT: whether each position is before the end of its sentence."""
    return jnp.arange(T, dtype=lengths_B.dtype)[None] < lengths_B[:, None]


def word_weights(emissions_KxV: Array, tokens_BxT: Array, masked_BxT: Array | None) -> Array:
    """Return weights_BxTxK: P(k emits the word at t), summed over all words if it is masked.

    A token that is no word (pad, mask) must be masked or past the end of the sentence.
    """
    weights_BxTxK = jnp.take(emissions_KxV.T, tokens_BxT, axis=0, mode="clip")
    if masked_BxT is None:
        return weights_BxTxK
    any_word_1x1xK = emissions_KxV.sum(axis=1)[None, None]
    return jnp.where(masked_BxT[..., None], any_word_1x1xK, weights_BxTxK)


def log_probs(weights_BxSxC: Array, counted_BxS: Array) -> Array:
    """Return log p_BxSxC in nats, with p prop. to the weights, and uniform where not counted.

    Each probability is at least the smallest normal number, so that p log p is 0, never NaN.
    """
    p_BxSxC = normalize(weights_BxSxC)
    p_BxSxC = jnp.where(counted_BxS[..., None], p_BxSxC, 1 / p_BxSxC.shape[2])
    return jnp.log(jnp.maximum(p_BxSxC, jnp.finfo(p_BxSxC.dtype).tiny))


def predict_words(outside_BxTxK: Array, emissions_KxV: Array, lengths_B: Array) -> Array:
    """Return `log_probs`_BxTxV with p(v) prop. to sum_k outside_t(k) P(k emits v).

    Uniform past the end.
    """
    outside_BxTxK = normalize(outside_BxTxK)
    weights_BxTxV = jnp.matmul(outside_BxTxK, emissions_KxV, precision="highest")
    return log_probs(weights_BxTxV, is_word(lengths_B, weights_BxTxV.shape[1]))
