"""What follows the words of a prefix: the next word or the end, and the symbols above the words.

A sentence of L words has a prediction s for each prefix x_0 .. x_s-1, s = 0..L: of the next symbol,
which is a word 0..V-1 or the stop symbol V.
"""

import jax.numpy as jnp
from jax import Array

from jaxflat.languages.sentences import is_word, log_probs


def is_prefix(lengths_B: Array, S: int) -> Array:
    """Return prefixes_BxS: whether the sentence has s words or more, s = 0..S-1."""
    return is_word(lengths_B + 1, S)


def predict_symbols(
    words_BxSxV: Array, lengths_B: Array, min_length: int, max_length: int
) -> Array:
    """Return `log_probs`_BxSxU of the next symbol of sentences whose lengths are uniform.

    words_BxSxV: p(next word = v | s words, and one more), up to a factor. Lengths tell nothing of
    the words: from min_length on, the sentence stops after s words with probability
    P(L = s | L >= s) = 1 / (max_length - s + 1). Uniform beyond the stop symbol.
    """
    positions_S = jnp.arange(words_BxSxV.shape[1], dtype=words_BxSxV.dtype)
    stop_S = jnp.where(positions_S < min_length, 0, 1 / (max_length + 1 - positions_S))
    stop_1xSx1 = stop_S[None, :, None]
    total_BxSx1 = words_BxSxV.sum(axis=2, keepdims=True)
    weights = [words_BxSxV * (1 - stop_1xSx1), total_BxSx1 * stop_1xSx1]
    return log_probs(jnp.concatenate(weights, axis=2), is_prefix(lengths_B, len(stop_S)))


def chain_rule(next_log_probs_BxSxU: Array, tokens_BxT: Array, lengths_B: Array) -> Array:
    """Return log p_B of sentences: sum_{s <= L} log p(x_s | x_0 .. x_s-1), x_L the stop symbol."""
    S, U = next_log_probs_BxSxU.shape[1:]
    words_BxS = jnp.pad(tokens_BxT, ((0, 0), (0, 1)))
    symbols_BxS = jnp.where(is_word(lengths_B, S), words_BxS, U - 1)
    chosen_BxS = jnp.take_along_axis(next_log_probs_BxSxU, symbols_BxS[..., None], axis=2)[..., 0]
    return jnp.where(is_prefix(lengths_B, S), chosen_BxS, 0).sum(axis=1)


def from_word(probs_BxTxC: Array, last_word: int, lengths_B: Array) -> Array:
    """Return probs_BxTxC at t >= last_word, before the end of the sentence; zeros elsewhere."""
    T = probs_BxTxC.shape[1]
    complete_T = jnp.arange(T, dtype=jnp.int32) >= last_word
    known_BxT = complete_T[None] & is_word(lengths_B, T)
    return jnp.where(known_BxT[..., None], probs_BxTxC, 0)
