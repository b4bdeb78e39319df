"""Between words and the hidden symbols that emit them: weights of the seen, predictions."""

import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import normalize
from jaxflat.languages.masking import is_word


def word_weights(emissions_KxV: Array, tokens_BxT: Array, masked_BxT: Array | None) -> Array:
    """weights_BxTxK: P(k emits the word at t), summed over all words where the word is masked.

    Tokens that are no words (pad, mask) must be masked or past the end of the sentence.
    """
    weights_BxTxK = jnp.take(emissions_KxV.T, tokens_BxT, axis=0, mode="clip")
    if masked_BxT is None:
        return weights_BxTxK
    any_word_1x1xK = emissions_KxV.sum(axis=1)[None, None]
    return jnp.where(masked_BxT[..., None], any_word_1x1xK, weights_BxTxK)


def predict_words(outside_BxTxK: Array, emissions_KxV: Array, lengths_B: Array) -> Array:
    """log p_BxTxV (nats), p(v) prop. to sum_k outside_t(k) P(k emits v); uniform past the end.

    The probability is floored at the smallest normal number, so that p log p is 0, never NaN.
    """
    outside_BxTxK = normalize(outside_BxTxK)
    p_BxTxV = normalize(jnp.matmul(outside_BxTxK, emissions_KxV, precision="highest"))
    words_BxT = is_word(lengths_B, p_BxTxV.shape[1])
    p_BxTxV = jnp.where(words_BxT[..., None], p_BxTxV, 1 / p_BxTxV.shape[2])
    return jnp.log(jnp.maximum(p_BxTxV, jnp.finfo(p_BxTxV.dtype).tiny))
