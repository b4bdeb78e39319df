"""Exact sampling of a grammar's derivations of at most T words: draw the length, then every split.

The number of words below each node is drawn before the node is expanded, from the probability
that a non-terminal yields n words, so no tree is ever rejected or cut, and all shapes are fixed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.categorical import draw


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tree:
    """The nodes of a sentence's tree, depth first, -1 after the last; M = 2T - 1; int32.

    Node m has non-terminal symbol[m] and is above words start[m] .. start[m] + width[m] - 1.
    """

    symbol_BxM: Array
    start_BxM: Array
    width_BxM: Array


class YieldTables(NamedTuple):
    """Probabilities by numbers of words; row 0 is zero. S = T + 1.

    words_SxN[n, A]: A yields n words.
    right_SxNxN[j, A, B]: A -> B C, and C yields j words, summed over C.
    split_SxSxN[k, j, A]: A -> B C, and B yields k and C yields j words, summed over B, C.
    """

    words_SxN: Array
    right_SxNxN: Array
    split_SxSxN: Array


def yield_tables(rules_NxNxN: Array, emissions_NxV: Array, max_length: int) -> YieldTables:
    """Y_1(A) = sum_v P(A -> v); Y_n(A) = sum_{k,B,C} P(A -> B C) Y_k(B) Y_{n-k}(C)."""
    sizes_S = jnp.arange(max_length + 1, dtype=jnp.int32)

    def fill(n: Array, words_SxN: Array) -> Array:
        others_SxN = words_SxN[jnp.maximum(n - sizes_S, 0)]
        pairs_NxN = jnp.matmul(words_SxN.T, others_SxN, precision="highest")
        return words_SxN.at[n].set(jnp.tensordot(rules_NxNxN, pairs_NxN, 2, precision="highest"))

    words_SxN = jnp.zeros((max_length + 1, len(rules_NxNxN)), rules_NxNxN.dtype)
    words_SxN = words_SxN.at[1].set(emissions_NxV.sum(axis=1))
    words_SxN = jax.lax.fori_loop(2, max_length + 1, fill, words_SxN)
    right = jnp.einsum("abc,jc->jab", rules_NxNxN, words_SxN, precision="highest")
    split = jnp.einsum("kb,jab->kja", words_SxN, right, precision="highest")
    return YieldTables(words_SxN, right, split)


def sample_sentence(
    tables: YieldTables,
    start_N: Array,
    rules_NxNxN: Array,
    emissions_NxV: Array,
    min_length: int,
    key: Array,
) -> tuple[Array, Array, Tree]:
    """(tokens_T, length, tree with M nodes) of one sentence, given min_length <= length <= T."""
    T, dtype = len(tables.words_SxN) - 1, start_N.dtype
    root_key, split_key, word_key = jax.random.split(key, 3)
    uniforms_Mx3 = jax.random.uniform(split_key, (2 * T - 1, 3), dtype)
    sizes_S = jnp.arange(T + 1, dtype=jnp.int32)

    def expand(slot: Array, nodes_Mx3: Array) -> Array:
        """Writes the children of node `slot`: a node of width w takes 2w - 1 slots, depth first."""
        symbol, start, width = nodes_Mx3[slot]
        rest_S = jnp.maximum(width - sizes_S, 0)
        k = draw(uniforms_Mx3[slot, 0], jnp.cumsum(tables.split_SxSxN[sizes_S, rest_S, symbol]))
        rest = width - k
        weights_N = tables.words_SxN[k] * tables.right_SxNxN[rest, symbol]
        left = draw(uniforms_Mx3[slot, 1], jnp.cumsum(weights_N))
        weights_N = rules_NxNxN[symbol, left] * tables.words_SxN[rest]
        right = draw(uniforms_Mx3[slot, 2], jnp.cumsum(weights_N))
        children_2x3 = jnp.array([[left, start, k], [right, start + k, rest]])
        slots_2 = jnp.array([slot + 1, slot + 2 * k])
        return nodes_Mx3.at[jnp.where(width > 1, slots_2, 2 * T)].set(children_2x3, mode="drop")

    # The length first, then the root given the length.
    u_length, u_root = jax.random.uniform(root_key, (2,), dtype)
    roots_SxN = jnp.where(sizes_S[:, None] >= min_length, start_N[None] * tables.words_SxN, 0)
    length = draw(u_length, jnp.cumsum(roots_SxN.sum(axis=1)))
    root = draw(u_root, jnp.cumsum(roots_SxN[length]))
    nodes_Mx3 = jnp.full((2 * T - 1, 3), -1, jnp.int32).at[0].set(jnp.array([root, 0, length]))
    nodes_Mx3 = jax.lax.fori_loop(0, 2 * T - 1, expand, nodes_Mx3)
    symbols_M, starts_M, widths_M = nodes_Mx3.T

    position_M = jnp.where(widths_M == 1, starts_M, T)
    preterminals_T = jnp.zeros(T, jnp.int32).at[position_M].set(symbols_M, mode="drop")
    uniforms_T = jax.random.uniform(word_key, (T,), dtype)
    words_T = draw(uniforms_T, jnp.cumsum(emissions_NxV, axis=1)[preterminals_T])
    tokens_T = jnp.where(sizes_S[:-1] < length, words_T, emissions_NxV.shape[1])
    return tokens_T, length, Tree(symbols_M, starts_M, widths_M)
