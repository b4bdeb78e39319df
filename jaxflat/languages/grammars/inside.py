"""Compute inside probabilities of a grammar: for all spans, or a hundred times faster by levels.

Baker, "Trainable grammars for speech recognition" (1979). For any grammar in Chomsky normal form
the chart has all spans.

In a grammar with levels both children of a symbol of level l are in level l + 1, so the symbol
spans at most 2^(L - 1 - l) words. A root joins a prefix and a suffix of the sentence, each below
one symbol of level 1. So level 1 needs prefixes only, and a suffix is a prefix of the reversed
sentence under mirrored rules.

The `Cells` of one level and width are a matrix: a row for each symbol, a column for each start and
sentence, sentences fastest. A cell is exp(scale) * weights, with a scale for every column. Forward
and reverse, cells come from outer products of columns and matrix products, which compilers do fast.
Automatic derivatives of outer products make sums that are slow, and wrong on large batches: XLA for
CPUs, jaxlib 0.10.2, reduces a product with a broadcast wrongly. `test_large_batches` watches it.
"""

from collections.abc import Mapping
from functools import partial, reduce
from itertools import accumulate, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.grammars.grammar import level_slices

Factors = Mapping[tuple[int, ...], Array]  # by place: () or (start, end)
Cells = tuple[list[Array], list[Array]]  # by width, from 1: weights (KxR) and log scales (R)


def chart_inside(
    rules_NxNxN: Array,
    weights_BxTxN: Array,
    lengths_B: Array,
    factors: Factors,
) -> Array:
    """Return P(A yields words 0 .. length - 1), BxN, up to a constant factor per sentence.

    weights_BxTxN[b, t, A] is P(A yields the word at t). factors[start, end] (BxN) multiply P(A
    yields words start .. end - 1) in all its uses, and factors[()] multiply the result. An empty
    sentence has 0.

    I_ij(A) = sum_{k,B,C} P(A -> B C) I_ik(B) I_kj(C). For each start i, `left` holds the cells of
    widths 1..w-1 that start at i. `right` holds those that end at i + w, widest first. Split k
    pairs left[k] with right[k]. A cell is exp(scale) * weights_N. The derivative takes scales as
    constants, since another choice of scale would describe the same cell.
    """

    def multiplied(cells_BxIxN: Array, width: int) -> Array:
        for start, end in filter(None, factors):
            if end - start == width:
                cells_BxIxN = cells_BxIxN.at[:, start].multiply(factors[start, end])
        return cells_BxIxN

    cells, scale = _close(weights_BxTxN, jnp.zeros_like(weights_BxTxN[..., 0]))
    cells = multiplied(cells, 1)
    left = right = cells[:, :, None]
    left_scale = right_scale = scale[:, :, None]
    whole = [cells[:, 0]]
    for width in range(2, weights_BxTxN.shape[1] + 1):
        left, right = left[:, :-1], right[:, 1:]
        left_scale, right_scale = left_scale[:, :-1], right_scale[:, 1:]
        cells, scale = _close(*_join_splits(rules_NxNxN, left, right, left_scale + right_scale))
        cells = multiplied(cells, width)
        left = jnp.concatenate([left, cells[:, :, None]], axis=2)
        right = jnp.concatenate([cells[:, :, None], right], axis=2)
        left_scale = jnp.concatenate([left_scale, scale[:, :, None]], axis=2)
        right_scale = jnp.concatenate([scale[:, :, None], right_scale], axis=2)
        whole.append(cells[:, 0])
    index_Bx1x1 = jnp.maximum(lengths_B[:, None, None] - 1, 0)
    whole_BxN = jnp.take_along_axis(jnp.stack(whole, axis=1), index_Bx1x1, axis=1)[:, 0]
    if () in factors:
        whole_BxN = whole_BxN * factors[()]
    return jnp.where(lengths_B[:, None] > 0, whole_BxN, 0)


def _close(cells: Array, scale: Array) -> tuple[Array, Array]:
    """Return the cells with their peak moved into the scale."""
    peak = jax.lax.stop_gradient(cells.max(axis=2))
    peak = jnp.where(peak > 0, peak, 1)
    return cells / peak[..., None], scale + jnp.log(peak)


@jax.checkpoint
def _join_splits(
    rules_NxNxN: Array, left: Array, right: Array, scales: Array
) -> tuple[Array, Array]:
    """Return cells (BxIxN) and log scales (BxI) from splits (BxIxSxN each, log scales BxIxS).

    The reverse pass recomputes it: the BxIxNxN products would be most of the memory.
    """
    shift = scales.max(axis=2, keepdims=True)
    left = left * jnp.exp(scales - shift)[..., None]
    pairs = jnp.einsum("bism,bisn->bimn", left, right, precision="highest")
    return jnp.einsum("bimn,amn->bia", pairs, rules_NxNxN, precision="highest"), shift[..., 0]


class ChartShape(NamedTuple):
    """The number of starts of a level's spans, by width from 2, and the widths of its children."""

    starts: tuple[int, ...]
    num_sentences: int
    child_widths: int

    def splits(self, width: int) -> range:
        """Return the widths that a left child may have."""
        return range(max(1, width - self.child_widths), min(self.child_widths, width - 1) + 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(shape: ChartShape, rules: Array, cells: list[Array], scales: list[Array]) -> Cells:
    """Return the cells of widths 2, 3, ... of a level from the cells of the level below."""
    return _combine_forward(shape, rules, cells, scales)[0]


def _combine_forward(
    shape: ChartShape, rules: Array, cells: list[Array], scales: list[Array]
) -> tuple[Cells, tuple]:
    B, found, found_scales = shape.num_sentences, [], []
    for width, num_starts in enumerate(shape.starts, start=2):
        raw, shift = sum_over_splits(
            rules, (cells, scales), shape.splits(width), width, num_starts, B
        )
        peak = raw.max(axis=0)
        peak = jnp.where(peak > 0, peak, 1)
        found.append(raw / peak[None])
        found_scales.append(shift + jnp.log(peak))
    return (found, found_scales), (rules, cells, scales, found_scales)


def sum_over_splits(
    rules: Array, children: Cells, splits: range, width: int, num_starts: int, B: int
) -> tuple[Array, Array]:
    """Return the weights (KxR) and log scales (R) of one width's spans at the first starts.

    Split k joins a left child of k words with a right one of width - k. The scale is the largest of
    a span's splits; the weights' own peak is not in it.
    """
    (cells, scales), columns, pairs = children, num_starts * B, []
    right = {k: slice(k * B, k * B + columns) for k in splits}
    sums = {k: scales[k - 1][:columns] + scales[width - k - 1][right[k]] for k in right}
    shift = reduce(jnp.maximum, sums.values())
    for k in right:
        left = cells[k - 1][:, :columns] * jnp.exp(sums[k] - shift)[None]
        pairs.append(_outer(left, cells[width - k - 1][:, right[k]]))
    return matmul(rules.reshape(len(rules), -1), _add_up(pairs)), shift


def _combine_reverse(shape: ChartShape, kept: tuple, cotangents: Cells) -> tuple:
    """Write the derivative as products of outer products with rules, like the forward pass.

    Scales are constants, since another choice of scale would describe the same cells.
    """
    rules, cells, scales, found_scales = kept
    B = shape.num_sentences
    to_left, to_right = _transposed(rules)
    into: list[list[Array]] = [[] for _ in cells]

    def add(width: int, part: Array, first_column: int) -> None:
        after = cells[width - 1].shape[1] - first_column - part.shape[1]
        into[width - 1].append(jnp.pad(part, ((0, 0), (first_column, after))))

    for k in range(1, shape.child_widths + 1):
        pairs: list[Array] = []
        for width, num_starts in enumerate(shape.starts, start=2):
            if k not in shape.splits(width):
                continue
            columns, j = num_starts * B, width - k
            right = slice(k * B, k * B + columns)
            sums = scales[k - 1][:columns] + scales[j - 1][right] - found_scales[width - 2]
            above = cotangents[0][width - 2] * jnp.exp(sums)[None]
            pairs.append(_outer(above, cells[j - 1][:, right]))
            add(j, matmul(to_right, _outer(above, cells[k - 1][:, :columns])), k * B)
        if pairs:
            add(k, matmul(to_left, _add_up(pairs)), 0)
    return None, [_add_up(p) if p else 0 * c for p, c in zip(into, cells, strict=True)], None


combine.defvjp(_combine_forward, _combine_reverse)


@jax.custom_vjp
def join(rules: Array, left: list[Array], right: list[Array]) -> Array:
    """Return sum_k rules (left[k] x right[k]), KxR, from lists of CxR and rules KxCxC."""
    pairs = [_outer(x, y) for x, y in zip(left, right, strict=True)]
    return matmul(rules.reshape(len(rules), -1), _add_up(pairs))


def _join_reverse(kept: tuple, cotangent: Array) -> tuple:
    rules, left, right = kept
    to_left, to_right = _transposed(rules)
    into_left = [matmul(to_left, _outer(cotangent, y)) for y in right]
    return None, into_left, [matmul(to_right, _outer(cotangent, x)) for x in left]


join.defvjp(lambda *inputs: (join(*inputs), inputs), _join_reverse)


def _transposed(rules: Array) -> list[Array]:
    """Return matrices from (above, right) pairs to left, and from (above, left) to right."""
    return [jnp.moveaxis(rules, axis, 0).reshape(rules.shape[1], -1) for axis in (1, 2)]


def _add_up(parts: list[Array]) -> Array:
    """Return the sum of matrices, with zeros for the last columns that some lack."""
    columns = max(part.shape[1] for part in parts)
    padded = [jnp.pad(part, ((0, 0), (0, columns - part.shape[1]))) for part in parts]
    return sum(padded[1:], padded[0])


def _outer(x: Array, y: Array) -> Array:
    """Return the products of all pairs of rows, column by column: (K*C)xR."""
    return (x[:, None] * y[None]).reshape(-1, x.shape[1])


def matmul(x: Array, y: Array) -> Array:
    """Return x y in full precision: accelerators round the factors by default."""
    return jnp.matmul(x, y, precision="highest")


class Marked(NamedTuple):
    """Cells of spans of `width` words at start_B, to multiply by factors: KxB, by level from 1."""

    width: int
    start_B: Array
    factors: list[Array]


def levelled_roots_inside(
    levels: tuple[int, ...],
    rules_NxNxN: Array,
    weights_BxTxN: Array,
    lengths_B: Array,
    factors: Factors,
) -> Array:
    """Return `chart_inside` of the symbols of level 0, BxK, by levels."""
    args = levels, rules_NxNxN, weights_BxTxN, lengths_B
    (roots_BxK, _), _ = _roots_and_prefixes(*args, factors)
    for place, factor_BxN in factors.items():
        start, end = place if place else (0, lengths_B)
        if start == 0:
            factor_BxK = factor_BxN[:, : levels[0]]
            roots_BxK *= jnp.where((lengths_B == end)[:, None], factor_BxK, 1)
    return roots_BxK


def levelled_inside(
    levels: tuple[int, ...], rules_NxNxN: Array, weights_BxTxN: Array, lengths_B: Array
) -> Array:
    """Return `chart_inside` of all symbols, BxN, by levels and without factors."""
    args = levels, rules_NxNxN, weights_BxTxN, lengths_B
    (roots_BxK, root_scale_B), prefixes = _roots_and_prefixes(*args, factors={})
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


def _roots_and_prefixes(
    levels: tuple[int, ...],
    rules_NxNxN: Array,
    weights_BxTxN: Array,
    lengths_B: Array,
    factors: Factors,
) -> tuple[tuple[Array, Array], list[Cells]]:
    """Return the roots' inside probabilities, their log scales, and all prefixes from level 1."""
    parts = level_slices(levels)
    rules = [rules_NxNxN[above, below, below] for above, below in pairwise(parts)]
    T = weights_BxTxN.shape[1]
    half = min(2 ** (len(levels) - 2), T)
    # One factor per word, for all levels: so a level of zero weights has a finite scale, too.
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
        in_prefixes.append(Marked(end - start, jnp.full_like(lengths_B, start), by_level))
        if start > 0:  # the first word is in no suffix
            in_suffixes.append(Marked(end - start, lengths_B - end, by_level))
    prefixes = prefix_cells(rules[1:], leaves(weights_BxTxN[:, :half]), in_prefixes)
    mirrored = [rule.swapaxes(1, 2) for rule in rules[1:]]
    suffixes = prefix_cells(mirrored, leaves(reversed_BxHxN), in_suffixes)[0]
    roots_KxB, scale_B = _whole(rules[0], prefixes[0], suffixes, lengths_B)
    one_word_1xB = lengths_B[None] == 1
    roots_KxB = jnp.where(one_word_1xB, weights_BxTxN[:, 0, parts[0]].T, roots_KxB)
    return (roots_KxB.T, jnp.where(one_word_1xB[0], 0, scale_B)), prefixes


def _whole(rules: Array, prefixes: Cells, suffixes: Cells, lengths_B: Array) -> tuple[Array, Array]:
    """Join prefixes of k words with suffixes of length - k words: KxB, log scales B."""
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


def prefix_cells(rules: list[Array], leaves: list[Array], marks: list[Marked]) -> list[Cells]:
    """Return the cells of each level, from rules[0], rules[1], ... and leaves (KxHxB each).

    The first level has prefixes only. Below it, spans start wherever a left sibling may end.
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
                marked = multiply_cells(cells[width - 1], start_B, factors[level])
                cells = [*cells[: width - 1], marked, *cells[width:]]
        found.insert(0, (cells, scales))
    return found


def multiply_cells(cells_KxR: Array, start_B: Array, factor_KxB: Array) -> Array:
    """Return the cells of one width, multiplied by the factor at start_B."""
    starts_S = jnp.arange(cells_KxR.shape[1] // len(start_B), dtype=start_B.dtype)
    here_1xSxB = (starts_S[:, None] == start_B[None])[None]
    return cells_KxR * jnp.where(here_1xSxB, factor_KxB[:, None], 1).reshape(cells_KxR.shape)
