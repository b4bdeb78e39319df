"""Inside probabilities of any grammar in Chomsky normal form, over the chart of all spans.

Baker, "Trainable grammars for speech recognition" (1979).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

Factors = Mapping[tuple[int, ...], Array]  # by place: () or (start, end)


def inside(
    rules_NxNxN: Array,
    weights_BxTxN: Array,
    lengths_B: Array,
    factors: Factors,
) -> Array:
    """P(A yields words 0 .. length - 1), BxN, up to a factor of each sentence's own; 0 for none.

    weights_BxTxN[b, t, A]: P(A yields the word at t). factors[start, end] (BxN) multiply P(A yields
    words start .. end - 1) wherever it is used; factors[()] the result.

    I_ij(A) = sum_{k,B,C} P(A -> B C) I_ik(B) I_kj(C). `left` holds, for the starts i still open,
    the cells of widths 1..w-1 that start at i, and `right` those that end at i + w, widest first:
    split k pairs left[k] with right[k]. A cell is exp(scale) * weights_N; scales are constants to
    the derivative, since another choice of scale would describe the same cell.
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
        cells, scale = _close(*_combine(rules_NxNxN, left, right, left_scale + right_scale))
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
    """The cells with their peak moved into the scale."""
    peak = jax.lax.stop_gradient(cells.max(axis=2))
    peak = jnp.where(peak > 0, peak, 1)
    return cells / peak[..., None], scale + jnp.log(peak)


@jax.checkpoint
def _combine(rules_NxNxN: Array, left: Array, right: Array, scales: Array) -> tuple[Array, Array]:
    """Cells (BxIxN) and their log scales (BxI) from splits (BxIxSxN each, log scales BxIxS).

    Recomputed in the reverse pass: the BxIxNxN products would be most of the memory.
    """
    shift = scales.max(axis=2, keepdims=True)
    left = left * jnp.exp(scales - shift)[..., None]
    pairs = jnp.einsum("bism,bisn->bimn", left, right, precision="highest")
    return jnp.einsum("bimn,amn->bia", pairs, rules_NxNxN, precision="highest"), shift[..., 0]
