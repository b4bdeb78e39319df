"""Cells of one level of a grammar from those of the level below, and back.

Cells of one level and width are a matrix: a row for each symbol, a column for each start and
sentence, sentences fastest. Each is exp(scale) * weights, with a scale for every column. All is
outer products of columns and matrix products, in the derivative too: what compilers do fast. (The
sums that automatic derivatives of outer products make are slow, and wrong on large batches: XLA for
CPUs, jaxlib 0.10.2, reduces a product with a broadcast wrongly. `test_large_batches` watches it.)
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Cells = tuple[list[Array], list[Array]]  # by width, from 1: weights (KxR) and log scales (R)


class ChartShape(NamedTuple):
    """Starts of a level's spans, by width from 2; sentences; the widths of the level below."""

    starts: tuple[int, ...]
    num_sentences: int
    child_widths: int

    def splits(self, width: int) -> range:
        """The widths that a left child may have."""
        return range(max(1, width - self.child_widths), min(self.child_widths, width - 1) + 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def combine(shape: ChartShape, rules: Array, cells: list[Array], scales: list[Array]) -> Cells:
    """The cells of widths 2, 3, ... of a level, from those of the level below."""
    return _combine_forward(shape, rules, cells, scales)[0]


def _combine_forward(
    shape: ChartShape, rules: Array, cells: list[Array], scales: list[Array]
) -> tuple[Cells, tuple]:
    B, found, found_scales = shape.num_sentences, [], []
    for width, num_starts in enumerate(shape.starts, start=2):
        columns, pairs = num_starts * B, []
        right = {k: slice(k * B, k * B + columns) for k in shape.splits(width)}
        sums = {k: scales[k - 1][:columns] + scales[width - k - 1][right[k]] for k in right}
        shift = reduce(jnp.maximum, sums.values())
        for k in right:
            left = cells[k - 1][:, :columns] * jnp.exp(sums[k] - shift)[None]
            pairs.append(outer(left, cells[width - k - 1][:, right[k]]))
        raw = matmul(rules.reshape(len(rules), -1), add_up(pairs))
        peak = raw.max(axis=0)
        peak = jnp.where(peak > 0, peak, 1)
        found.append(raw / peak[None])
        found_scales.append(shift + jnp.log(peak))
    return (found, found_scales), (rules, cells, scales, found_scales)


def _combine_reverse(shape: ChartShape, kept: tuple, cotangents: Cells) -> tuple:
    """Products of outer products with rules again, which the derivative of `outer` is not.

    Scales are constants: another choice of scale would describe the same cells.
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
            pairs.append(outer(above, cells[j - 1][:, right]))
            add(j, matmul(to_right, outer(above, cells[k - 1][:, :columns])), k * B)
        if pairs:
            add(k, matmul(to_left, add_up(pairs)), 0)
    return None, [add_up(p) if p else 0 * c for p, c in zip(into, cells, strict=True)], None


combine.defvjp(_combine_forward, _combine_reverse)


@jax.custom_vjp
def join(rules: Array, left: list[Array], right: list[Array]) -> Array:
    """sum_k rules (left[k] x right[k]): KxR from lists of CxR, and KxCxC."""
    pairs = [outer(x, y) for x, y in zip(left, right, strict=True)]
    return matmul(rules.reshape(len(rules), -1), add_up(pairs))


def _join_reverse(kept: tuple, cotangent: Array) -> tuple:
    rules, left, right = kept
    to_left, to_right = _transposed(rules)
    into_left = [matmul(to_left, outer(cotangent, y)) for y in right]
    return None, into_left, [matmul(to_right, outer(cotangent, x)) for x in left]


join.defvjp(lambda *inputs: (join(*inputs), inputs), _join_reverse)


def _transposed(rules: Array) -> list[Array]:
    """The rules as matrices from (above, right) pairs to left, and from (above, left) to right."""
    return [jnp.moveaxis(rules, axis, 0).reshape(rules.shape[1], -1) for axis in (1, 2)]


def add_up(parts: list[Array]) -> Array:
    """The sum of matrices that may lack columns at the end."""
    columns = max(part.shape[1] for part in parts)
    padded = [jnp.pad(part, ((0, 0), (0, columns - part.shape[1]))) for part in parts]
    return sum(padded[1:], padded[0])


def outer(x: Array, y: Array) -> Array:
    """Products of all pairs of rows, column by column: (K*C)xR."""
    return (x[:, None] * y[None]).reshape(-1, x.shape[1])


def matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision="highest")
