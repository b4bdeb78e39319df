"""Batches for a masked language model, made from a key alone."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.masking import mask_id, mask_one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskedBatch:
    """Sentences with hidden words, and what is to be predicted there.

    targets_BxMxV: a distribution over words for each of the positions_BxM.
    """

    inputs_BxT: Array
    lengths_B: Array
    positions_BxM: Array
    targets_BxMxV: Array


def masked_batch(language: Any, key: Array, batch_size: int, targets: str) -> MaskedBatch:
    """Sample sentences with one masked position each, uniform over the sentence's words.

    targets: "exact" gives the language's conditionals p(x_t | the other words), "sampled" the
    masked word itself, one-hot. Both have the same expected gradient; the first has no label noise.
    """
    sentence_key, mask_key = jax.random.split(key)
    sentences = language.sample(sentence_key, batch_size)
    tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
    num_words = language.num_words
    inputs_BxT, positions_BxM = mask_one(mask_key, tokens_BxT, lengths_B, mask_id(num_words))
    if targets == "exact":
        log_probs_BxTxV = language.conditional_log_probs(tokens_BxT, lengths_B)
        log_probs_BxMxV = jnp.take_along_axis(log_probs_BxTxV, positions_BxM[..., None], axis=1)
        targets_BxMxV = jnp.exp(log_probs_BxMxV)
    else:
        words_BxM = jnp.take_along_axis(tokens_BxT, positions_BxM, axis=1)
        targets_BxMxV = jax.nn.one_hot(words_BxM, num_words)
    return MaskedBatch(inputs_BxT, lengths_B, positions_BxM, targets_BxMxV)
