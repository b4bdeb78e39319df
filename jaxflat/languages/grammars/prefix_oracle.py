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
    forward_weights,
    log_or_impossible,
    make_chart,
    matmul,
)
from jaxflat.languages.grammars.inside import Marked
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
        log_or_impossible(jnp.matmul(start_K, cells[:, :B], precision="highest")) + scale[:B]
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
    changes = [(p, A) for p, place in enumerate(places) for A in _symbols(tables, place, T)]
    factors_RxPxN = np.ones((1 + len(places) + len(changes), len(places), N))
    for p in range(len(places)):
        factors_RxPxN[1 + p, p] = 0
    for run, (p, A) in enumerate(changes, start=1 + len(places)):
        factors_RxPxN[run, p] = np.arange(N) == A
    one_run = partial(_factored, tables, tokens_BxT, places)
    factors = jnp.asarray(factors_RxPxN, tables.start_K.dtype)
    log_RxTxB, ends = jax.lax.map(one_run, factors)
    ratio_RxTxB = jnp.exp(log_RxTxB - log_RxTxB[:1])
    runs = {change: run for run, change in enumerate(changes, start=1 + len(places))}
    words_BxTx1 = is_word(lengths_B, T)[..., None]
    found = []
    for p, (place, log_end_RxNxB) in enumerate(zip(places, ends, strict=True)):
        zero_TxB = jnp.zeros_like(ratio_RxTxB[0])
        rows = [runs.get((p, A)) for A in range(N)]
        joint = [zero_TxB if r is None else ratio_RxTxB[r] - ratio_RxTxB[1 + p] for r in rows]
        joint_BxTxN = jnp.maximum(jnp.stack(joint, axis=2).swapaxes(0, 1), 0)
        if place and place[1] <= T:
            t = place[1] - 1
            end_NxB = jnp.exp(log_end_RxNxB[0] - log_RxTxB[0, t][None])
            end_NxB = jnp.where(log_end_RxNxB[0] > IMPOSSIBLE / 2, end_NxB, 0)
            joint_BxTxN = joint_BxTxN.at[:, t].set(end_NxB.T)
        found.append(jnp.where(words_BxTx1, joint_BxTxN, 0))
    return found


def _symbols(tables: PrefixTables, place: tuple[int, ...], T: int) -> list[int]:
    """Return the symbols of which a node above the place may have words after it."""
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


def _factored(
    tables: PrefixTables,
    tokens_BxT: Array,
    places: Sequence[tuple[int, ...]],
    factors_PxN: Array,
) -> tuple[Array, list[Array]]:
    """Return log P(words 0..t), TxB, and log P(words 0..end - 1, with A above the place), NxB each.

    Both are relative to the words' maxima. Inside probabilities of places have the factors.
    """
    B, T = tokens_BxT.shape
    marks = []
    for place, factor_N in zip(places, factors_PxN, strict=True):
        if place:
            start_B = jnp.full(B, place[0], jnp.int32)
            levels = [jnp.tile(factor_N[part][:, None], (1, B)) for part in tables.levels]
            marks.append(Marked(place[1] - place[0], start_B, levels))
        else:
            start_K = tables.start_K * factor_N[tables.levels[0]]
            tables = tables._replace(start_K=start_K)
    chart = make_chart(tables, tokens_BxT, marks)
    widths = (1, *(place[1] - place[0] if place else 0 for place in places))
    cells_IxPxNxB, scales_IxPxB = forward_weights(tables, chart, widths)
    weights_TxNxB = cells_IxPxNxB[:T, 0] * chart.weights_NxTxB.swapaxes(0, 1)
    log_TxB = log_or_impossible(weights_TxNxB.sum(axis=1)) + scales_IxPxB[:T, 0]
    ends = []
    for p, place in enumerate(places, start=1):
        start = place[0] if place else 0
        log_weight_NxB = log_or_impossible(cells_IxPxNxB[start, p]) + scales_IxPxB[start, p][None]
        ends.append(_log_inside(tables, chart, place) + log_weight_NxB)
    return jnp.maximum(log_TxB, IMPOSSIBLE), ends


def _log_inside(tables: PrefixTables, chart: Chart, place: tuple[int, ...]) -> Array:
    """Return log P(A yields the words of the place), NxB, if the chart has them."""
    B, found = chart.log_maxima_TxB.shape[1], []
    for part, (cells, scales) in zip(tables.levels, chart.cells, strict=True):
        start, end = place or (0, 0)
        here = slice(start * B, (start + 1) * B)
        if 0 < end - start <= len(cells) and here.stop <= cells[end - start - 1].shape[1]:
            cells_KxB, scale_B = cells[end - start - 1][:, here], scales[end - start - 1][here]
            found.append(log_or_impossible(cells_KxB) + scale_B[None])
        else:
            shape = part.stop - part.start, B
            found.append(jnp.full(shape, IMPOSSIBLE, chart.log_maxima_TxB.dtype))
    return jnp.concatenate(found)
