"""Scores of candidate words and completions in sentences of an autoregressive language.

The language is a `Generated`. A score is log p(x_t = v | what is seen) up to a term without v.
Symbols are the words 0..V-1 and V, which stops the sentence and fills it to the end.
"""

from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CHUNK = 2**21  # logits computed at once
_LANES = 8  # sentences side by side, so that a mesh can split them over its devices
_SIZES = 16  # numbers of words to read for a candidate that code is compiled for


def picked(logits_SxR: Array, symbols_S: Array) -> Array:
    """log q_S of these symbols, in nats, without an array of the log-probabilities of all."""
    chosen_S = jnp.take_along_axis(logits_SxR, symbols_S[:, None], axis=1)[:, 0]
    return chosen_S - jax.nn.logsumexp(logits_SxR, axis=1)


def candidate_scores(
    language: Any, symbols_BxU: Array, lengths_B: Array, positions_BxM: Array
) -> Array:
    """scores_BxMxV of all words at each of the positions, all other words seen.

    The B * M questions are split into lanes and sorted, within each, by the number of words to
    read for a candidate: questions answered together then need about as many.
    """
    (B, M), U = positions_BxM.shape, symbols_BxU.shape[1]
    C = gcd(B, _LANES)  # lanes, each of B / C sentences and Q = B / C * M questions
    last_B = jnp.minimum(lengths_B, language.max_length - 1)
    num_read_BxM = jnp.maximum(last_B[:, None] - positions_BxM, 0)
    num_read_CxQ, positions_CxQ = (x.reshape(C, -1) for x in (num_read_BxM, positions_BxM))
    symbols_CxGxU = symbols_BxU.reshape(C, B // C, U)
    order_CxQ = jnp.argsort(num_read_CxQ, axis=1)

    def answer(questions_C: Array) -> Array:
        def of_lane(x_CxQ: Array) -> Array:
            return jnp.take_along_axis(x_CxQ, questions_C[:, None], axis=1)[:, 0]

        sentences_Cx1x1 = (questions_C // M)[:, None, None]
        symbols_CxU = jnp.take_along_axis(symbols_CxGxU, sentences_Cx1x1, axis=1)[:, 0]
        return _scores(language, symbols_CxU, of_lane(positions_CxQ), of_lane(num_read_CxQ))

    scores_CxQxV = jax.lax.map(answer, order_CxQ.T).swapaxes(0, 1)
    back_CxQ = jnp.argsort(order_CxQ, axis=1)
    scores_CxQxV = jnp.take_along_axis(scores_CxQxV, back_CxQ[..., None], axis=1)
    return scores_CxQxV.reshape(B, M, language.num_words)


def _scores(language: Any, symbols_CxU: Array, positions_C: Array, num_read_C: Array) -> Array:
    """scores_CxV at one position of each of C sentences: q(v | x_<t) and what it does to the rest.

    The model reads a sentence once; every candidate then shares its cache of the words before t.
    """
    logits_CxPxR, cache = language.logits(language.inputs(symbols_CxU))
    prior_CxR = jnp.take_along_axis(logits_CxPxR, positions_C[:, None, None], axis=1)[:, 0]
    prior_CxV = prior_CxR[:, : language.num_words]
    cache_of_one = jax.tree.map(lambda x: x[:, :, None], cache)

    def following(size: int) -> Array:
        """log q of the next `size` symbols after t where candidate v stands at t, CxV."""

        def one(word: Array, cache: Any, symbols_U: Array, t: Array, num_read: Array) -> Array:
            offsets_S = jnp.arange(size, dtype=jnp.int32)
            read_S = jnp.where(offsets_S == 0, word, symbols_U.at[t + offsets_S].get(mode="clip"))
            next_S = symbols_U.at[t + offsets_S + 1].get(mode="clip")
            logits_1xSxR, _ = language.logits(language.ids_R[read_S][None], cache, t + 1)
            return jnp.where(offsets_S < num_read, picked(logits_1xSxR[0], next_S), 0).sum()

        def some(words_K: Array) -> Array:
            of_words = jax.vmap(one, in_axes=(0, None, None, None, None))
            of_lanes = jax.vmap(of_words, in_axes=(None, 1, 0, 0, 0))
            return of_lanes(words_K, cache_of_one, symbols_CxU, positions_C, num_read_C)

        C, V = prior_CxV.shape
        num_chunks = -(-V * C * size * len(language.ids_R) // CHUNK)
        words_NxK = jnp.arange(num_chunks * -(-V // num_chunks), dtype=jnp.int32) % V
        log_q_NxCxK = jax.lax.map(some, words_NxK.reshape(num_chunks, -1))
        return log_q_NxCxK.swapaxes(0, 1).reshape(C, -1)[:, :V]

    most = min(symbols_CxU.shape[1], language.max_length) - 1
    step = -(-most // _SIZES) or 1
    sizes = range(step, most + step, step)
    branches = [lambda: jnp.zeros_like(prior_CxV), *(lambda s=s: following(s) for s in sizes)]
    return prior_CxV + jax.lax.switch(-(-num_read_C.max() // step), branches)


def completion_scores(language: Any, tokens_T: Array, length: int, hidden_M: np.ndarray) -> Array:
    """scores_TxV of a sentence of which the words at the positions hidden_M are not seen either.

    Row t is log of the sum of P(sentence) over all that the words there and at t can be; rows past
    the end are zero. Hidden words have their rows from one sum, every other word from its own.
    """
    V, hidden = language.num_words, tuple(hidden_M.tolist())
    seen = [t for t in range(length) if t not in hidden]
    sums = [tuple(sorted((*hidden, t))) for t in seen]
    if hidden:
        sums = [hidden, *sums]
    rows: dict[int, Array] = {}
    for unseen in sums:
        m = len(unseen)
        words_NxM = np.indices((V,) * m, np.int32).reshape(m, -1).T
        completions_NxT = jnp.tile(jnp.asarray(tokens_T)[None], (V**m, 1))
        completions_NxT = completions_NxT.at[:, np.array(unseen)].set(words_NxM)
        lengths_N = jnp.full(V**m, length, jnp.int32)
        log_probs = language.log_prob(completions_NxT, lengths_N).reshape((V,) * m)
        for axis, t in enumerate(unseen):
            if t not in rows:
                besides = tuple(a for a in range(m) if a != axis)
                rows[t] = jax.nn.logsumexp(log_probs, axis=besides)
    nothing_V = jnp.zeros_like(rows[0])
    return jnp.stack([rows.get(t, nothing_V) for t in range(len(tokens_T))])
