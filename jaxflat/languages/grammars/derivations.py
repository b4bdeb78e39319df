"""Exact sampling of a grammar's derivations of at most T words: draw the length, then every split.

The number of words below each node is drawn before the node is expanded, from the probability
that a non-terminal yields n words, so no tree is ever rejected or cut, and all shapes are fixed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxflat.languages.categorical import draw
from jaxflat.languages.grammars.grammar import Grammar


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
    """Weights by numbers of words, each up to a factor that no draw depends on. S = T + 1.

    roots_SxN[n, A]: the sentence has n words, min_length or more, and the root is A.
    splits_SxSxN[n, k, A]: of the n words of A the left child yields k.
    words_SxN[n, A]: A yields n words.
    rights_SxNxN[j, A, B]: A -> B C, and C yields j words, summed over C.
    """

    roots_SxN: Array
    splits_SxSxN: Array
    words_SxN: Array
    rights_SxNxN: Array


def yield_tables(grammar: Grammar, min_length: int, max_length: int) -> YieldTables:
    """Tables from Y_1(A) = sum_v P(A -> v), Y_n(A) = sum_{k,B,C} P(A -> B C) Y_k(B) Y_{n-k}(C).

    Y_n may be too small for floating point numbers: it is kept as exp(scales_S[n]) words_SxN[n].
    Raises ValueError where there is no sentence of min_length to max_length words.
    """
    S, N = max_length + 1, len(grammar.nonterminals)
    words_SxN, scales_S = np.zeros((S, N)), np.full(S, -np.inf)
    splits_SxSxN, rights_SxNxN = np.zeros((S, S, N)), np.zeros((S, N, N))
    for n in range(1, S):
        if n == 1:
            scale, yields_N = 0.0, grammar.emissions_NxV.sum(axis=1)
        else:
            k = np.arange(1, n)
            logs_k = scales_S[k] + scales_S[n - k]
            scale = max(logs_k.max(), np.finfo(float).min)
            terms_kxN = np.einsum("kab,kb->ka", rights_SxNxN[n - k], words_SxN[k])
            terms_kxN *= np.exp(logs_k - scale)[:, None]
            yields_N = terms_kxN.sum(axis=0)
            splits_SxSxN[n, k] = terms_kxN / np.where(yields_N > 0, yields_N, 1)
        if peak := yields_N.max():
            words_SxN[n], scales_S[n] = yields_N / peak, scale + np.log(peak)
        rights_SxNxN[n] = grammar.rules_NxNxN @ words_SxN[n]
    scales_S[:min_length] = -np.inf
    roots_SxN = grammar.start_N * words_SxN
    scales_S[roots_SxN.sum(axis=1) == 0] = -np.inf
    if np.isneginf(scales_S).all():
        raise ValueError(f"the grammar has no sentence of {min_length}..{max_length} words")
    roots_SxN *= np.exp(scales_S - scales_S.max())[:, None]
    tables = roots_SxN / roots_SxN.sum(), splits_SxSxN, words_SxN, rights_SxNxN
    return YieldTables(*(jnp.asarray(table, jnp.float32) for table in tables))


def sample_sentence(
    tables: YieldTables, rules_NxNxN: Array, emissions_NxV: Array, key: Array
) -> tuple[Array, Array, Tree]:
    """(tokens_T, length, tree with M nodes) of one sentence of at most T words."""
    T, dtype = len(tables.words_SxN) - 1, tables.words_SxN.dtype
    root_key, split_key, word_key = jax.random.split(key, 3)
    uniforms_Mx3 = jax.random.uniform(split_key, (2 * T - 1, 3), dtype)
    sizes_S = jnp.arange(T + 1, dtype=jnp.int32)

    def expand(slot: Array, nodes_Mx3: Array) -> Array:
        """Writes the children of node `slot`: a node of width w takes 2w - 1 slots, depth first."""
        symbol, start, width = nodes_Mx3[slot]
        k = draw(uniforms_Mx3[slot, 0], jnp.cumsum(tables.splits_SxSxN[width, :, symbol]))
        rest = width - k
        weights_N = tables.words_SxN[k] * tables.rights_SxNxN[rest, symbol]
        left = draw(uniforms_Mx3[slot, 1], jnp.cumsum(weights_N))
        weights_N = rules_NxNxN[symbol, left] * tables.words_SxN[rest]
        right = draw(uniforms_Mx3[slot, 2], jnp.cumsum(weights_N))
        children_2x3 = jnp.array([[left, start, k], [right, start + k, rest]])
        slots_2 = jnp.array([slot + 1, slot + 2 * k])
        return nodes_Mx3.at[jnp.where(width > 1, slots_2, 2 * T)].set(children_2x3, mode="drop")

    # The length first, then the root given the length.
    u_length, u_root = jax.random.uniform(root_key, (2,), dtype)
    length = draw(u_length, jnp.cumsum(tables.roots_SxN.sum(axis=1)))
    root = draw(u_root, jnp.cumsum(tables.roots_SxN[length]))
    nodes_Mx3 = jnp.full((2 * T - 1, 3), -1, jnp.int32).at[0].set(jnp.array([root, 0, length]))
    nodes_Mx3 = jax.lax.fori_loop(0, 2 * T - 1, expand, nodes_Mx3)
    symbols_M, starts_M, widths_M = nodes_Mx3.T

    position_M = jnp.where(widths_M == 1, starts_M, T)
    preterminals_T = jnp.zeros(T, jnp.int32).at[position_M].set(symbols_M, mode="drop")
    uniforms_T = jax.random.uniform(word_key, (T,), dtype)
    words_T = draw(uniforms_T, jnp.cumsum(emissions_NxV, axis=1)[preterminals_T])
    tokens_T = jnp.where(sizes_S[:-1] < length, words_T, emissions_NxV.shape[1])
    return tokens_T, length, Tree(symbols_M, starts_M, widths_M)
