"""Answer questions about the prefixes of a grammar's sentences, from forward probabilities."""

import jax.numpy as jnp
from jax import Array

from jaxflat.languages.grammars.forward import (
    IMPOSSIBLE,
    Chart,
    PrefixTables,
    log_or_impossible,
    make_chart,
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
