"""Inside probabilities of grammars with levels: what `chart` computes, a hundred times faster.

A symbol of level l has both children in level l + 1, so it spans at most 2^(L - 1 - l) words. A
root joins a prefix of the sentence and a suffix, each below one symbol of level 1: of level 1 only
prefixes are ever needed, and a suffix is a prefix of the reversed sentence under mirrored rules.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.grammars.chart import Factors
from jaxflat.languages.grammars.combine import Cells, ChartShape, combine, join
from jaxflat.languages.grammars.grammar import level_slices


class Mark(NamedTuple):
    """Cells to multiply: those of `width` words at start_B, of each level from 1 by a KxB."""

    width: int
    start_B: Array
    factors: list[Array]


def roots_inside(
    levels: tuple[int, ...],
    rules_NxNxN: Array,
    weights_BxTxN: Array,
    lengths_B: Array,
    factors: Factors,
) -> Array:
    """P(A yields words 0 .. length - 1) for the symbols A of level 0, BxK, up to a factor of the
    sentence's own; weights_BxTxN[b, t, A] is P(A yields the word at t). factors[start, end] (BxN)
    multiply P(A yields words start .. end - 1) wherever it is used; factors[()] the result."""
    args = levels, rules_NxNxN, weights_BxTxN, lengths_B
    (roots_BxK, _), _ = _inside(*args, factors)
    for place, factor_BxN in factors.items():
        start, end = place if place else (0, lengths_B)
        if start == 0:
            factor_BxK = factor_BxN[:, : levels[0]]
            roots_BxK *= jnp.where((lengths_B == end)[:, None], factor_BxK, 1)
    return roots_BxK


def inside(
    levels: tuple[int, ...], rules_NxNxN: Array, weights_BxTxN: Array, lengths_B: Array
) -> Array:
    """P(A yields words 0 .. length - 1) for all symbols A, BxN, up to a factor of the sentence's
    own."""
    args = levels, rules_NxNxN, weights_BxTxN, lengths_B
    (roots_BxK, root_scale_B), prefixes = _inside(*args, factors={})
    parts, scales = [roots_BxK], [root_scale_B]
    for cells, scale in prefixes:
        width_1xB = lengths_B[None] - 1
        found_1xB = width_1xB < len(cells)
        index_1xB = jnp.minimum(width_1xB, len(cells) - 1)
        prefix_WxKxB = jnp.stack([c[:, : len(lengths_B)] for c in cells])
        scale_WxB = jnp.stack([s[: len(lengths_B)] for s in scale])
        prefix_KxB = jnp.take_along_axis(prefix_WxKxB, index_1xB[None], axis=0)[0]
        parts.append(jnp.where(found_1xB, prefix_KxB, 0).T)
        scales.append(jnp.take_along_axis(scale_WxB, index_1xB, axis=0)[0])
    shifts = [jnp.where(p.max(axis=1) > 0, s, -jnp.inf) for p, s in zip(parts, scales, strict=True)]
    shift_B = jnp.maximum(jnp.stack(shifts).max(axis=0), jnp.finfo(weights_BxTxN.dtype).min)
    factors = [jnp.exp(jnp.minimum(s - shift_B, 0)) for s in scales]
    return jnp.concatenate([p * f[:, None] for p, f in zip(parts, factors, strict=True)], axis=1)


def _inside(
    levels: tuple[int, ...],
    rules_NxNxN: Array,
    weights_BxTxN: Array,
    lengths_B: Array,
    factors: Factors,
) -> tuple[tuple[Array, Array], list[Cells]]:
    """The roots' inside probabilities with their log scales, and all prefixes from level 1 on."""
    parts = level_slices(levels)
    rules = [rules_NxNxN[above, below, below] for above, below in pairwise(parts)]
    T = weights_BxTxN.shape[1]
    half = min(2 ** (len(levels) - 2), T)
    # One factor for each word: weights of a level that are all zero still have a sensible scale.
    peak_BxTx1 = jax.lax.stop_gradient(weights_BxTxN.max(axis=2, keepdims=True))
    weights_BxTxN = weights_BxTxN / jnp.where(peak_BxTx1 > 0, peak_BxTx1, 1)
    from_end_BxH = lengths_B[:, None] - 1 - jnp.arange(half, dtype=lengths_B.dtype)[None]
    index_BxHx1 = jnp.maximum(from_end_BxH, 0)[..., None]
    reversed_BxHxN = jnp.take_along_axis(weights_BxTxN, index_BxHx1, axis=1)

    def leaves(weights_BxHxN: Array) -> list[Array]:
        weights_NxHxB = weights_BxHxN.T
        return [weights_NxHxB[part] for part in parts[1:]]

    in_prefixes, in_suffixes = [], []
    for (start, end), factor_BxN in ((p, f) for p, f in factors.items() if p):
        by_level = [factor_BxN[:, part].T for part in parts[1:]]
        in_prefixes.append(Mark(end - start, jnp.full_like(lengths_B, start), by_level))
        if start > 0:  # the first word is in no suffix
            in_suffixes.append(Mark(end - start, lengths_B - end, by_level))
    prefixes = _prefixes(rules[1:], leaves(weights_BxTxN[:, :half]), in_prefixes)
    mirrored = [rule.swapaxes(1, 2) for rule in rules[1:]]
    suffixes = _prefixes(mirrored, leaves(reversed_BxHxN), in_suffixes)[0]
    roots_KxB, scale_B = _whole(rules[0], prefixes[0], suffixes, lengths_B)
    one_word_1xB = lengths_B[None] == 1
    roots_KxB = jnp.where(one_word_1xB, weights_BxTxN[:, 0, parts[0]].T, roots_KxB)
    return (roots_KxB.T, jnp.where(one_word_1xB[0], 0, scale_B)), prefixes


def _whole(rules: Array, prefixes: Cells, suffixes: Cells, lengths_B: Array) -> tuple[Array, Array]:
    """Whole sentences (KxB, log scales B): prefixes of k words with suffixes of length - k."""
    widths, B = len(prefixes[0]), len(lengths_B)
    suffix_WxKxB = jnp.stack([c[:, :B] for c in suffixes[0]])
    suffix_scale_WxB = jnp.stack([s[:B] for s in suffixes[1]])
    index_WxB = lengths_B[None] - 2 - jnp.arange(widths, dtype=lengths_B.dtype)[:, None]
    fits_WxB = (index_WxB >= 0) & (index_WxB < widths)
    index_WxB = jnp.clip(index_WxB, 0, widths - 1)
    other_WxKxB = jnp.take_along_axis(suffix_WxKxB, index_WxB[:, None], axis=0)
    other_scale_WxB = jnp.take_along_axis(suffix_scale_WxB, index_WxB, axis=0)
    prefix_scale_WxB = jnp.stack([s[:B] for s in prefixes[1]])
    scale_WxB = jax.lax.stop_gradient(prefix_scale_WxB + other_scale_WxB)
    scale_WxB = jnp.where(fits_WxB, scale_WxB, -jnp.inf)
    shift_B = jnp.maximum(scale_WxB.max(axis=0), jnp.finfo(scale_WxB.dtype).min)
    factor_WxB = jnp.exp(scale_WxB - shift_B[None])
    prefix_WxKxB = jnp.stack([c[:, :B] for c in prefixes[0]]) * factor_WxB[:, None]
    return join(rules, list(prefix_WxKxB), list(other_WxKxB)), shift_B


def _prefixes(rules: list[Array], leaves: list[Array], marks: list[Mark]) -> list[Cells]:
    """The cells of levels 1, 2, ... from rules[0], rules[1], ... and leaves (KxHxB each).

    Level 1 has prefixes only. Below it, spans may start where a left sibling may end.
    """
    half, num_sentences = leaves[0].shape[1:]
    widths = [min(2 ** (len(leaves) - 1 - level), half) for level in range(len(leaves))]
    last_start = [0, *accumulate(widths[1:])]

    def starts(level: int, width: int) -> int:
        return min(last_start[level], half - width) + 1

    found: list[Cells] = []
    for level in reversed(range(len(leaves))):
        shown = leaves[level][:, : starts(level, 1)]
        cells = [shown.reshape(len(shown), -1)]
        scales = [jnp.zeros_like(cells[0][0])]
        if found:
            wider = range(2, widths[level] + 1)
            starts_of = tuple(starts(level, width) for width in wider)
            shape = ChartShape(starts_of, num_sentences, widths[level + 1])
            wider_cells: Cells = combine(shape, rules[level], *found[0])
            cells, scales = cells + wider_cells[0], scales + wider_cells[1]
        for width, start_B, factors in marks:
            if width <= len(cells):
                marked = _multiply(cells[width - 1], start_B, factors[level])
                cells = [*cells[: width - 1], marked, *cells[width:]]
        found.insert(0, (cells, scales))
    return found


def _multiply(cells_KxR: Array, start_B: Array, factor_KxB: Array) -> Array:
    """The cells of one width, with those at start_B multiplied by the factor."""
    starts_S = jnp.arange(cells_KxR.shape[1] // len(start_B), dtype=start_B.dtype)
    here_1xSxB = (starts_S[:, None] == start_B[None])[None]
    return cells_KxR * jnp.where(here_1xSxB, factor_KxB[:, None], 1).reshape(cells_KxR.shape)
