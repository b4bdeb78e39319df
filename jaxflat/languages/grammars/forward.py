"""Compute forward probabilities of a grammar: one pass predicts the word after every prefix.

Stolcke, "An efficient probabilistic context-free parsing algorithm that computes prefix
probabilities" (1995). Lengths are limited, so here they also count the words to come. F_i(A, m) is
the probability of words 0..i-1, then a node A, then m words. Let Y_n(A) = P(A yields n words) and
I_ki(A) = P(A yields words k..i-1). Then F_0(A, 0) = P(the root is A), and

    F_i(B, m) += sum_{A,C,n} F_i(A, m - n) P(A -> B C) Y_n(C)    for a left child B
    F_i(C, m) += sum_{k,A,B} F_k(A, m) P(A -> B C) I_ki(B)       for a right child C, after B.

Words 0..i-1 and then v have the probability sum_{A,m} F_i(A, m) P(A -> v), over all m for which
i + 1 + m words are allowed.

Spans are `Cells` as in `inside`. F_i is an array KxMxB for each level, with one log scale for each
sentence. So Y_n is multiplied by exp(tilt * n), with a tilt that makes all n about as probable, and
the sum over m takes the tilt out.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.grammars.grammar import level_slices
from jaxflat.languages.grammars.inside import (
    Cells,
    Marked,
    matmul,
    multiply_cells,
    prefix_cells,
    sum_over_splits,
)
from jaxflat.languages.sentences import word_weights

IMPOSSIBLE = -1e30  # the log scale of zeros; sums of a few of them are finite


class PrefixTables(NamedTuple):
    """What all sentences share. A grammar has one level, or children one level below parents.

    With levels, steps[level][n - 1, B, A] = sum_C P(A -> B C) Y_n(C), tilted. With one level,
    steps[0][n, B, A] is P(n words after B are below A), tilted. B is A or any left descendant.
    """

    lengths: range  # the allowed numbers of words
    levels: list[slice]
    start_K: Array
    rules: list[Array]  # by level of the parent, KxCxC
    emissions_NxV: Array
    steps: list[Array]  # by level of the parent, WxCxK
    tilt: Array
    log_total: Array  # log P(the number of words is allowed)


class Chart(NamedTuple):
    """Cells of spans by level. The weights of each word are divided by their maximum."""

    cells: list[Cells]
    weights_NxTxB: Array
    log_maxima_TxB: Array


def prefix_tables(
    levels: Sequence[int],
    start_N: Array,
    rules_NxNxN: Array,
    emissions_NxV: Array,
    lengths: range,
) -> PrefixTables:
    """Return the tables. With several levels, all roots must be in level 0."""
    parts, S = level_slices(levels), lengths.stop
    families = list(pairwise(parts)) or [(parts[0], parts[0])]
    rules = [rules_NxNxN[above, below, below] for above, below in families]
    yields_SxN, scale_S = _yields(rules_NxNxN, emissions_NxV.sum(axis=1), S)
    n_S = jnp.arange(S, dtype=scale_S.dtype)
    slope_S = (scale_S[1] - scale_S) / jnp.maximum(n_S - 1, 1)
    others_S = (n_S > 1) & (scale_S > IMPOSSIBLE)
    tilt = jnp.min(jnp.where(others_S, slope_S, jnp.inf))
    tilt = jnp.where(jnp.isfinite(tilt), tilt, 0)
    tilted_SxN = yields_SxN * jnp.exp(scale_S + tilt * n_S)[:, None]
    steps = [
        jnp.einsum("abc,nc->nba", rule, tilted_SxN[:, below], precision="highest")
        for rule, (_, below) in zip(rules, families, strict=True)
    ]
    if len(parts) == 1:
        steps = [_chains(steps[0][:-1])]
    else:
        steps = [s[1 : 1 + 2 ** (len(steps) - 1 - level)] for level, s in enumerate(steps)]
    roots_S = matmul(yields_SxN, start_N)
    log_total = jax.nn.logsumexp((log_or_impossible(roots_S) + scale_S)[lengths.start :])
    start_K = start_N[parts[0]]
    return PrefixTables(lengths, parts, start_K, rules, emissions_NxV, steps, tilt, log_total)


def _yields(rules_NxNxN: Array, words_N: Array, S: int) -> tuple[Array, Array]:
    """Return Y_n(A) = exp(scale_S[n]) yields_SxN[n, A] for n < S, as in `yield_tables`."""

    def add(n: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        yields_SxN, scale_S = found
        rest_S = n - jnp.arange(S, dtype=n.dtype)
        log_S = jnp.where(rest_S > 0, scale_S + scale_S[rest_S], 2 * IMPOSSIBLE)
        left_SxN = yields_SxN * jnp.exp(log_S - log_S.max())[:, None]
        pairs_NxN = matmul(left_SxN.T, yields_SxN[rest_S])
        raw_N = jnp.tensordot(rules_NxNxN, pairs_NxN, axes=2, precision="highest")
        weights_N, scale = scaled(raw_N, log_S.max(), axes=(0,))
        return yields_SxN.at[n].set(weights_N), scale_S.at[n].set(scale)

    weights_N, scale = scaled(words_N, jnp.zeros((), words_N.dtype), axes=(0,))
    yields_SxN = jnp.zeros((S, len(words_N)), words_N.dtype).at[1].set(weights_N)
    scale_S = jnp.full(S, IMPOSSIBLE, words_N.dtype).at[1].set(scale)
    return jax.lax.fori_loop(2, S, add, (yields_SxN, scale_S))


def scaled(weights: Array, scale: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return the weights with their maximum over the axes moved into the log scale."""
    maximum = weights.max(axis=axes)
    some = maximum > 0
    maximum = jnp.where(some, maximum, 1)
    scale = jnp.where(some, scale + jnp.log(maximum), IMPOSSIBLE)
    return weights / jnp.expand_dims(maximum, axes), scale


def _chains(steps_SxNxN: Array) -> Array:
    """Return the sums over chains of left children with n words after them in all."""
    found = [jnp.eye(steps_SxNxN.shape[1], dtype=steps_SxNxN.dtype)]
    for n in range(1, len(steps_SxNxN)):
        above = jnp.stack(found[::-1])
        chains = jnp.einsum("ncb,nba->ca", steps_SxNxN[1 : n + 1], above, precision="highest")
        found.append(chains)
    return jnp.stack(found)


def log_or_impossible(probs: Array) -> Array:
    return jnp.where(probs > 0, jnp.log(jnp.where(probs > 0, probs, 1)), IMPOSSIBLE)


def make_chart(tables: PrefixTables, tokens_BxT: Array, marks: list[Marked]) -> Chart:
    """Return the cells of all spans that a node may be above."""
    weights_NxTxB = word_weights(tables.emissions_NxV, tokens_BxT, None).transpose(2, 1, 0)
    zeros_TxB = jnp.zeros_like(weights_NxTxB[0])
    weights_NxTxB, log_maxima_TxB = scaled(weights_NxTxB, zeros_TxB, axes=(0,))
    leaves = [weights_NxTxB[part] for part in tables.levels]
    if len(leaves) == 1:
        cells = [_cells_of_one_level(tables.rules[0], leaves[0], marks)]
    else:
        cells = prefix_cells(tables.rules, leaves, marks)
    return Chart(cells, weights_NxTxB, log_maxima_TxB)


def _cells_of_one_level(rules: Array, leaves_NxTxB: Array, marks: list[Marked]) -> Cells:
    N, T, B = leaves_NxTxB.shape
    cells: list[Array] = []
    scales: list[Array] = []
    for width in range(1, T + 1):
        if width == 1:
            found, scale = leaves_NxTxB.reshape(N, -1), jnp.zeros_like(leaves_NxTxB[0]).reshape(-1)
        else:
            splits, num_starts = range(1, width), T - width + 1
            raw, scale = sum_over_splits(rules, (cells, scales), splits, width, num_starts, B)
            found, scale = scaled(raw, scale, axes=(0,))
        for mark in marks:
            if mark.width == width:
                found = multiply_cells(found, mark.start_B, mark.factors[0])
        cells.append(found)
        scales.append(scale)
    return cells, scales


class Weights(NamedTuple):
    """weights[i, p, A, b] is P(words 0..i-1, then A above widths[p] words, then allowed lengths).

    It lacks the probability of A's words. The log scales are those of `Chart.weights_NxTxB`.
    """

    cells_IxPxNxB: Array
    scales_IxPxB: Array


def forward_weights(tables: PrefixTables, chart: Chart, widths: Sequence[int]) -> Weights:
    """Return the weights of nodes that start at i = 0, 1, .. T, or at the last possible word."""
    T, B = chart.log_maxima_TxB.shape
    ones_1x1xB = jnp.ones_like(chart.log_maxima_TxB[None, :1])
    roots_KxMxB = tables.start_K[:, None, None] * ones_1x1xB
    cells, scale_B = _complete(tables, [roots_KxMxB], jnp.zeros_like(roots_KxMxB[0, 0]), 0)
    first = _allowed(tables, cells, scale_B, 0, widths)
    last = min(T, tables.lengths.stop - 2)
    if last == 0:
        return jax.tree.map(lambda x: x[None], first)

    def advance(before: tuple[list[Array], Array], inputs: tuple) -> tuple:
        i, siblings = inputs
        children, scale_B = _right_children(tables, *before, siblings)
        if len(tables.levels) > 1:
            children = [jnp.zeros_like(roots_KxMxB), *children]
        cells, scale_B = _complete(tables, children, scale_B, i)
        after = [_push(new, old) for new, old in zip(cells, before[0], strict=False)]
        return (after, _push(scale_B, before[1])), _allowed(tables, cells, scale_B, i, widths)

    below = chart.cells[1:] or chart.cells
    siblings = [_by_end(cells, B, last) for cells in below]
    windows = [weights.shape[1] for weights, _ in siblings]
    history = [
        _push(new, jnp.zeros((window, *new.shape), new.dtype))
        for new, window in zip(cells, windows, strict=False)
    ]
    scales_WxB = _push(scale_B, jnp.full((max(windows), B), IMPOSSIBLE, scale_B.dtype))
    inputs = jnp.arange(1, last + 1, dtype=jnp.int32), siblings
    _, rest = jax.lax.scan(advance, (history, scales_WxB), inputs)
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, rest)


def _push(new: Array, old: Array) -> Array:
    return jnp.concatenate([new[None], old[:-1]])


def _by_end(cells: Cells, B: int, last: int) -> tuple[Array, Array]:
    """Return the spans that end at 1 .. last, by width: cells IxWxCxB, and log scales IxWxB."""
    found, found_scales = [], []
    for width, (weights, scales) in enumerate(zip(*cells, strict=True), start=1):
        num_starts = min(weights.shape[1] // B, last + 1 - width)
        if num_starts < 1:
            break
        weights_IxCxB = weights[:, : num_starts * B].reshape(-1, num_starts, B).swapaxes(0, 1)
        scales_IxB = scales[: num_starts * B].reshape(num_starts, B)
        scales_IxB = jnp.where(weights_IxCxB.max(axis=1) > 0, scales_IxB, IMPOSSIBLE)
        around = width - 1, last + 1 - width - num_starts
        found.append(jnp.pad(weights_IxCxB, (around, (0, 0), (0, 0))))
        found_scales.append(jnp.pad(scales_IxB, (around, (0, 0)), constant_values=IMPOSSIBLE))
    return jnp.stack(found, axis=1), jnp.stack(found_scales, axis=1)


def _right_children(
    tables: PrefixTables,
    parents: list[Array],
    scales_WxB: Array,
    siblings: list[tuple[Array, Array]],
) -> tuple[list[Array], Array]:
    """Return the right children of one place by level, CxMxB, and their log scale.

    parents[level][w - 1] (WxKxMxB) start w words before, siblings[level][w - 1] (WxCxB) have w
    words.
    """
    sums = [scales + scales_WxB[: len(scales)] for _, scales in siblings]
    scale_B = reduce(jnp.maximum, [sum_WxB.max(axis=0) for sum_WxB in sums])
    found = []
    for level, (rules_KxCxC, sum_WxB) in enumerate(zip(tables.rules, sums, strict=True)):
        left_WxCxB = siblings[level][0] * jnp.exp(sum_WxB - scale_B[None])[:, None]
        pairs = [
            above_KxMxB[:, None] * left_CxB[None, :, None]
            for above_KxMxB, left_CxB in zip(parents[level], left_WxCxB, strict=True)
        ]
        pairs_KxCxMxB = reduce(jnp.add, pairs)
        K, C, M, B = pairs_KxCxMxB.shape
        rules_CxP = rules_KxCxC.transpose(2, 0, 1).reshape(-1, K * C)
        found.append(matmul(rules_CxP, pairs_KxCxMxB.reshape(K * C, M * B)).reshape(-1, M, B))
    return found, scale_B


def _complete(
    tables: PrefixTables, cells: list[Array], scale_B: Array, i: Array | int
) -> tuple[list[Array], Array]:
    """Return the cells of one place with all left descendants, and their log scale."""
    most = tables.lengths.stop - 1
    found = list(cells)
    for level, steps_WxCxK in enumerate(tables.steps):
        if len(tables.levels) == 1:
            found[0] = _left_below(found[0], steps_WxCxK, 0, most)
            continue
        below_CxMxB = _left_below(found[level], steps_WxCxK, 1, most)
        for right_CxMxB in found[level + 1 : level + 2]:  # at place 0 there are no right children
            after = below_CxMxB.shape[1] - right_CxMxB.shape[1]
            below_CxMxB += jnp.pad(right_CxMxB, ((0, 0), (0, after), (0, 0)))
        found[level + 1 : level + 2] = [below_CxMxB]
    fits = [jnp.arange(c.shape[1], dtype=jnp.int32) + i < most for c in found]
    found = [jnp.where(f[None, :, None], c, 0) for f, c in zip(fits, found, strict=True)]
    maximum_B = reduce(jnp.maximum, [c.max(axis=(0, 1)) for c in found])
    positive_B = maximum_B > 0
    maximum_B = jnp.where(positive_B, maximum_B, 1)
    scale_B = jnp.where(positive_B, scale_B + jnp.log(maximum_B), IMPOSSIBLE)
    return [c / maximum_B[None, None] for c in found], scale_B


def _left_below(above_KxMxB: Array, steps_WxCxK: Array, first: int, most: int) -> Array:
    """Return left descendants, CxMxB; steps[w] adds first + w words to those that come after."""
    W, C, K = steps_WxCxK.shape
    M, B = above_KxMxB.shape[1:]
    num_rests = min(M + first + W - 1, most)
    shifted = []
    for n in range(first, first + W):
        kept = above_KxMxB[:, : max(0, num_rests - n)]
        around = (0, 0), (n, num_rests - n - kept.shape[1]), (0, 0)
        shifted.append(jnp.pad(kept, around).reshape(K, -1))
    steps_CxP = steps_WxCxK.transpose(1, 0, 2).reshape(C, W * K)
    return matmul(steps_CxP, jnp.concatenate(shifted)).reshape(C, num_rests, B)


def _allowed(
    tables: PrefixTables, cells: list[Array], scale_B: Array, i: Array | int, widths: Sequence[int]
) -> Weights:
    """Sum over the numbers of words after nodes at i with which the length is allowed."""
    most = tables.lengths.stop - 1
    m_M = jnp.arange(most, dtype=jnp.int32)
    found, found_scales = [], []
    for width in widths:
        length_M = i + width + m_M
        allowed_M = (length_M >= tables.lengths.start) & (length_M <= most)
        log_M = jnp.where(allowed_M, -tables.tilt * m_M.astype(scale_B.dtype), IMPOSSIBLE)
        log_scale = log_M.max()
        factor_M = jnp.where(allowed_M, jnp.exp(log_M - log_scale), 0)
        parts = []
        for cells_KxMxB in cells:
            K, M, B = cells_KxMxB.shape
            sums_KxP = jnp.kron(jnp.eye(K, dtype=factor_M.dtype), factor_M[None, :M])
            parts.append(matmul(sums_KxP, cells_KxMxB.reshape(K * M, B)))
        found.append(jnp.concatenate(parts))
        found_scales.append(scale_B + log_scale)
    return Weights(jnp.stack(found), jnp.stack(found_scales))
