"""Answer questions about the prefixes of a grammar's sentences, from forward probabilities."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxflat.languages.grammars.forward import (
    IMPOSSIBLE,
    Chart,
    PrefixTables,
    Weights,
    forward_weights,
    log_or_impossible,
    make_chart,
)
from jaxflat.languages.grammars.inside import Marked, matmul
from jaxflat.languages.prefixes import is_prefix
from jaxflat.languages.sentences import is_word, log_probs


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
    found = [
        log_or_impossible(matmul(start_K, cells[:, :B])) + scale[:B]
        for cells, scale in zip(*chart.cells[0], strict=True)
    ]
    found += [jnp.full(B, IMPOSSIBLE, start_K.dtype)] * (T - len(found))
    return jnp.stack(found)


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
    weights_BxSxU = jnp.concatenate([words_BxSxV, stop_SxB.T[..., None]], axis=2)
    return log_probs(weights_BxSxU, is_prefix(lengths_B, T + 1))


def prefix_posteriors(
    tables: PrefixTables,
    tokens_BxT: Array,
    lengths_B: Array,
    places: Sequence[tuple[int, ...]],
) -> list[Array]:
    """Return p(A is above the place | words 0..t), BxTxN for each place; 0 where t is not after it.

    Let D be the probability of words 0..t. It is linear in a factor f_A of P(A yields the words of
    the place), since a tree has one node there at most. So p(A is above the place, words 0..t) is
    D(f_A = 1, others 0) - D(all 0). A node whose last word is t has forward weight times inside
    probability. Places are spans, or () for the root, which is there from the first word on.
    """
    T, N = tokens_BxT.shape[1], len(tables.emissions_NxV)
    spans = [place for place in places if place and place[1] <= T]
    log_TxB, log_ends = _unfactored(tables, tokens_BxT, spans)
    changes = [(p, A) for p, place in enumerate(places) for A in _symbols(tables, place, T)]
    factors_RxPxN = np.ones((len(places) + len(changes), len(places), N))
    for p in range(len(places)):
        factors_RxPxN[p, p] = 0
    for run, (p, A) in enumerate(changes, start=len(places)):
        factors_RxPxN[run, p] = np.arange(N) == A
    one_run = partial(_factored, tables, tokens_BxT, places)
    log_RxTxB = jax.lax.map(one_run, jnp.asarray(factors_RxPxN, tables.start_K.dtype))
    ratio_RxTxB = jnp.exp(log_RxTxB - log_TxB[None])
    runs = {change: run for run, change in enumerate(changes, start=len(places))}
    words_BxTx1 = is_word(lengths_B, T)[..., None]
    found = []
    for p, place in enumerate(places):
        zero_TxB = jnp.zeros_like(ratio_RxTxB[0])
        rows = [runs.get((p, A)) for A in range(N)]
        joint = [zero_TxB if r is None else ratio_RxTxB[r] - ratio_RxTxB[p] for r in rows]
        joint_BxTxN = jnp.maximum(jnp.stack(joint, axis=2).swapaxes(0, 1), 0)
        if place in log_ends:
            t, log_end_NxB = place[1] - 1, log_ends[place]
            end_NxB = jnp.exp(log_end_NxB - log_TxB[t][None])
            end_NxB = jnp.where(log_end_NxB > IMPOSSIBLE / 2, end_NxB, 0)
            joint_BxTxN = joint_BxTxN.at[:, t].set(end_NxB.T)
        found.append(jnp.where(words_BxTx1, joint_BxTxN, 0))
    return found


def _symbols(tables: PrefixTables, place: tuple[int, ...], T: int) -> list[int]:
    """Return the symbols that a node above the place may have, if words follow the place."""
    symbols: list[int] = []
    for level, part in enumerate(tables.levels):
        if not place:
            possible = level == 0
        elif len(tables.levels) == 1:
            possible = place[1] < T
        else:
            start, end = place
            left_child = level > 1 or (level == 1 and start == 0)
            possible = (
                end < T and left_child and end - start <= 2 ** (len(tables.levels) - 1 - level)
            )
        symbols += range(part.start, part.stop) if possible else ()
    return symbols


def _unfactored(
    tables: PrefixTables, tokens_BxT: Array, spans: Sequence[tuple[int, ...]]
) -> tuple[Array, dict[tuple[int, ...], Array]]:
    """Return log P(words 0..t), TxB, and log P(words 0..end - 1, with A above them), NxB by span.

    Both are relative to the words' maxima.
    """
    chart = make_chart(tables, tokens_BxT, [])
    weights = forward_weights(tables, chart, (1, *(end - start for start, end in spans)))
    log_ends = {}
    for p, span in enumerate(spans, start=1):
        weights_NxB, scale_B = (x[span[0], p] for x in weights)
        log_weight_NxB = log_or_impossible(weights_NxB) + scale_B[None]
        log_ends[span] = _log_inside(tables, chart, span) + log_weight_NxB
    return _prefixes(chart, weights), log_ends


def _factored(
    tables: PrefixTables,
    tokens_BxT: Array,
    places: Sequence[tuple[int, ...]],
    factors_PxN: Array,
) -> Array:
    """Return log P(words 0..t), TxB, where inside probabilities of places have the factors."""
    B, marks = len(tokens_BxT), []
    for place, factor_N in zip(places, factors_PxN, strict=True):
        if place:
            start_B = jnp.full(B, place[0], jnp.int32)
            levels = [jnp.tile(factor_N[part][:, None], (1, B)) for part in tables.levels]
            marks.append(Marked(place[1] - place[0], start_B, levels))
        else:
            start_K = tables.start_K * factor_N[tables.levels[0]]
            tables = tables._replace(start_K=start_K)
    chart = make_chart(tables, tokens_BxT, marks)
    return _prefixes(chart, forward_weights(tables, chart, widths=(1,)))


def _prefixes(chart: Chart, weights: Weights) -> Array:
    """Return log P(words 0..t), TxB, relative to the words' maxima."""
    T = len(chart.log_maxima_TxB)
    weights_TxNxB = weights.cells_IxPxNxB[:T, 0] * chart.weights_NxTxB.swapaxes(0, 1)
    log_TxB = log_or_impossible(weights_TxNxB.sum(axis=1)) + weights.scales_IxPxB[:T, 0]
    return jnp.maximum(log_TxB, IMPOSSIBLE)


def _log_inside(tables: PrefixTables, chart: Chart, span: tuple[int, ...]) -> Array:
    """Return log P(A yields the words of the span), NxB, if the chart has them."""
    (start, end), B, found = span, chart.log_maxima_TxB.shape[1], []
    for part, (cells, scales) in zip(tables.levels, chart.cells, strict=True):
        here = slice(start * B, (start + 1) * B)
        if end - start <= len(cells) and here.stop <= cells[end - start - 1].shape[1]:
            cells_KxB, scale_B = cells[end - start - 1][:, here], scales[end - start - 1][here]
            found.append(log_or_impossible(cells_KxB) + scale_B[None])
        else:
            shape = part.stop - part.start, B
            found.append(jnp.full(shape, IMPOSSIBLE, chart.log_maxima_TxB.dtype))
    return jnp.concatenate(found)
