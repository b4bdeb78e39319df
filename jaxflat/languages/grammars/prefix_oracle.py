"""Answer questions about the prefixes of a grammar's sentences, from forward probabilities."""

import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import normalize
from jaxflat.languages.grammars.forward import (
    IMPOSSIBLE,
    Chart,
    PrefixTables,
    forward_weights,
    log_or_impossible,
    make_chart,
    matmul,
)


def log_prob(tables: PrefixTables, tokens_BxT: Array, lengths_B: Array) -> Array:
    """Return log p(sentence), its length included, B nats; -inf if it is impossible."""
    chart = make_chart(tables, tokens_BxT, [])
    log_probs_TxB = _sentences(chart, tables.start_K) + jnp.cumsum(chart.log_maxima_TxB, axis=0)
    found_B = jnp.take_along_axis(log_probs_TxB, jnp.maximum(lengths_B - 1, 0)[None], axis=0)[0]
    allowed_B = (lengths_B >= tables.lengths.start) & (lengths_B < tables.lengths.stop)
    possible_B = allowed_B & (found_B > IMPOSSIBLE / 2)
    return jnp.where(possible_B, found_B - tables.log_total, -jnp.inf)


def _sentences(chart: Chart, start_K: Array) -> Array:
    """Return log P(words 0..t are a sentence), TxB, relative to the words' maxima."""
    T, B = chart.log_maxima_TxB.shape
    log_probs = [
        log_or_impossible(jnp.matmul(start_K, cells[:, :B], precision="highest")) + scale[:B]
        for cells, scale in zip(*chart.cells[0], strict=True)
    ]
    log_probs += [jnp.full(B, IMPOSSIBLE, start_K.dtype)] * (T - len(log_probs))
    return jnp.stack(log_probs)


def next_log_probs(tables: PrefixTables, tokens_BxT: Array, lengths_B: Array) -> Array:
    """Return log p(next word or stop | words 0..s-1), BxSxU nats, for s from 0 to T.

    Uniform after the end. Each probability is at least the smallest normal number.
    """
    T = tokens_BxT.shape[1]
    chart = make_chart(tables, tokens_BxT, [])
    cells_IxPxNxB, scales_IxPxB = forward_weights(tables, chart, widths=(1,))
    after = T + 1 - len(cells_IxPxNxB)  # 1 if no word can follow T words
    weights_BxIxN = cells_IxPxNxB[:, 0].transpose(2, 0, 1)
    words_BxIxV = matmul(weights_BxIxN, tables.emissions_NxV)
    words_BxSxV = jnp.pad(words_BxIxV, ((0, 0), (0, after), (0, 0)))
    scale_SxB = jnp.pad(scales_IxPxB[:, 0], ((0, after), (0, 0)), constant_values=IMPOSSIBLE)
    s_S = jnp.arange(T + 1, dtype=jnp.int32)
    stop_TxB = _sentences(chart, tables.start_K)
    stop_SxB = jnp.pad(stop_TxB, ((1, 0), (0, 0)), constant_values=IMPOSSIBLE)
    stop_SxB = jnp.where((s_S >= tables.lengths.start)[:, None], stop_SxB, IMPOSSIBLE)
    shift_SxB = jnp.maximum(scale_SxB, stop_SxB)
    words_BxSxV *= jnp.exp(scale_SxB - shift_SxB).T[..., None]
    # Where nothing is possible, exp(0) would make the stop certain.
    stop_SxB = jnp.where(stop_SxB > IMPOSSIBLE / 2, jnp.exp(stop_SxB - shift_SxB), 0)
    p_BxSxU = normalize(jnp.concatenate([words_BxSxV, stop_SxB.T[..., None]], axis=2))
    known_BxS = s_S[None] <= lengths_B[:, None]
    p_BxSxU = jnp.where(known_BxS[..., None], p_BxSxU, 1 / p_BxSxU.shape[2])
    return jnp.log(jnp.maximum(p_BxSxU, jnp.finfo(p_BxSxU.dtype).tiny))
