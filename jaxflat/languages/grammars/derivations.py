"""Sample exactly from a grammar's derivations, node by node or level by level.

The number of words below each node is drawn before the node is expanded, from the probability that
a non-terminal yields n words. So no tree is rejected or cut, and all shapes are fixed. A grammar
with levels draws all nodes of a level together, from alias tables.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxflat.languages.categorical import alias_table, draw, draw_alias
from jaxflat.languages.grammars.grammar import Grammar, level_slices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tree:
    """The nodes of each sentence's tree, int32; node 0 is the root, and -1 marks an unused slot.

    Node m has non-terminal symbol[m] and is above words start[m] .. start[m] + width[m] - 1.
    """

    symbol_BxM: Array
    start_BxM: Array
    width_BxM: Array


class YieldTables(NamedTuple):
    """Weights by numbers of words, with S = T + 1, each up to a factor that no draw depends on.

    roots_SxN[n, A]: the sentence has n words, at least min_length, and the root is A.
    splits_SxSxN[n, k, A]: the left child yields k of the n words of A.
    words_SxN[n, A]: A yields n words.
    rights_SxNxN[j, A, B]: A -> B C, and C yields j words, summed over C.
    """

    roots_SxN: Array
    splits_SxSxN: Array
    words_SxN: Array
    rights_SxNxN: Array


def yield_tables(grammar: Grammar, min_length: int, max_length: int) -> YieldTables:
    """Return the tables to sample sentences of min_length to max_length words.

    Let Y_n(A) = P(A yields n words). Then Y_1(A) = sum_v P(A -> v) and
    Y_n(A) = sum_{k,B,C} P(A -> B C) Y_k(B) Y_{n-k}(C). Y_n may be too small for floating point
    numbers, so it is stored as exp(scales_S[n]) words_SxN[n]. Raises ValueError if the grammar has
    no sentence of such a length.
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


def sample_node_by_node(
    tables: YieldTables, rules_NxNxN: Array, emissions_NxV: Array, key: Array
) -> tuple[Array, Array, Tree]:
    """Return (tokens_T, length, tree) of one sentence; its M = 2T - 1 nodes are depth first."""
    T, dtype = len(tables.words_SxN) - 1, tables.words_SxN.dtype
    root_key, split_key, word_key = jax.random.split(key, 3)
    uniforms_Mx3 = jax.random.uniform(split_key, (2 * T - 1, 3), dtype)
    sizes_S = jnp.arange(T + 1, dtype=jnp.int32)

    def expand(slot: Array, nodes_Mx3: Array) -> Array:
        """Write the children of node `slot`; a subtree of w words takes 2w - 1 slots."""
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


class LevelTables(NamedTuple):
    """Alias tables, rows first. Level l has K symbols, level l + 1 has C.

    roots: one row; outcome n * K + A is a sentence of n words below A.
    splits[l]: row A * (widths of A, from 0) + n; outcome (k - 1) * C + B is A -> B with k words.
    rights[l]: row (A * C + B) * (widths of a child, from 0) + j; outcome D is A -> B D with j words
    below D.
    words: row A of all symbols; the outcome is the word.
    """

    roots: Array
    splits: tuple[Array, ...]
    rights: tuple[Array, ...]
    words: Array


def level_tables(grammar: Grammar, min_length: int, max_length: int) -> LevelTables:
    """Return the tables of `yield_tables` for a grammar with levels, as alias tables.

    Raises ValueError if the grammar has no sentence of min_length to max_length words.
    """
    parts = level_slices(grammar.levels)
    words_N = grammar.emissions_NxV.sum(axis=1)
    yields_WxC = np.stack([np.zeros(grammar.levels[-1]), words_N[parts[-1]]])
    splits, rights = [], []
    for above, below in reversed(list(pairwise(parts))):
        rules_KxCxC = grammar.rules_NxNxN[above, below, below]
        W, (K, C, _) = len(yields_WxC), rules_KxCxC.shape
        widest = min(2 * (W - 1), max_length)
        right_KxCxWxC = np.einsum("abd,jd->abjd", rules_KxCxC, yields_WxC)
        splits_KxSxWxC = np.zeros((K, widest + 1, W - 1, C))
        for width in range(2, widest + 1):
            for k in range(max(1, width - W + 1), min(W, width)):
                right_KxC = right_KxCxWxC[:, :, width - k].sum(axis=2)
                splits_KxSxWxC[:, width, k - 1] = yields_WxC[k] * right_KxC
        splits.insert(0, splits_KxSxWxC.reshape(K * (widest + 1), -1))
        rights.insert(0, right_KxCxWxC.reshape(-1, C))
        yields_WxC = splits_KxSxWxC.sum(axis=(2, 3)).T.copy()
        yields_WxC[1] = words_N[above]
    roots_SxK = yields_WxC * grammar.start_N[parts[0]]
    roots_SxK[:min_length] = 0
    if roots_SxK.sum() == 0:
        raise ValueError(f"the grammar has no sentence of {min_length}..{max_length} words")
    return LevelTables(
        roots=jnp.asarray(alias_table(roots_SxK.reshape(1, -1))),
        splits=tuple(jnp.asarray(alias_table(table)) for table in splits),
        rights=tuple(jnp.asarray(alias_table(table)) for table in rights),
        words=jnp.asarray(alias_table(grammar.emissions_NxV)),
    )


def sample_level_by_level(
    tables: LevelTables,
    levels: tuple[int, ...],
    num_words: int,
    T: int,
    key: Array,
    batch_size: int,
) -> tuple[Array, Array, Tree]:
    """Return (tokens_BxT, lengths_B, trees); sentence b is a function of (key, b) alone.

    Nodes are ordered by level, with 2^l slots for level l from left to right.
    """
    num_inner = 2 ** (len(levels) - 1) - 1
    bits_RxB = jax.random.bits(key, (batch_size, 1 + 2 * num_inner + T), jnp.uint32).T
    outcome_1xB = draw_alias(bits_RxB[:1], tables.roots, jnp.zeros((1, batch_size), jnp.int32))
    symbol, width = outcome_1xB % levels[0], outcome_1xB // levels[0]
    start, lengths_B = jnp.zeros_like(width), width[0]
    nodes, used = [(symbol, start, width)], 1
    for splits, rights, C in zip(tables.splits, tables.rights, levels[1:], strict=True):
        num_nodes = len(symbol)
        bits_2xMxB = bits_RxB[used : used + 2 * num_nodes].reshape(2, num_nodes, -1)
        used += 2 * num_nodes
        row = symbol * (len(splits) // levels[len(nodes) - 1]) + width
        outcome = draw_alias(bits_2xMxB[0], splits, row)
        inner = width > 1
        left, k = outcome % C, jnp.where(inner, outcome // C + 1, 0)
        rest = jnp.where(inner, width - k, 0)
        child_widths = len(rights) // (levels[len(nodes) - 1] * C)
        row = (symbol * C + left) * child_widths + rest
        right = draw_alias(bits_2xMxB[1], rights, row)
        children = ((left, right), (start, start + k), (k, rest))
        symbol, start, width = (jnp.stack(c, axis=1).reshape(-1, batch_size) for c in children)
        nodes.append((symbol, start, width))
    first = [part.start for part in level_slices(levels)]
    symbol_MxB = jnp.concatenate([n[0] + f for n, f in zip(nodes, first, strict=True)])
    start_MxB, width_MxB = (jnp.concatenate([n[i] for n in nodes]) for i in (1, 2))
    place_MxB = jnp.where(width_MxB == 1, start_MxB, T)
    positions_Tx1 = jnp.arange(T, dtype=jnp.int32)[:, None]
    # Nodes that are no leaves have position T, which is out of bounds, so they write nothing.
    flat_MxB = place_MxB * batch_size + jnp.arange(batch_size, dtype=jnp.int32)[None]
    above = jnp.zeros(T * batch_size, jnp.int32).at[flat_MxB].set(symbol_MxB, mode="drop")
    above_TxB = above.reshape(T, batch_size)
    words_TxB = draw_alias(bits_RxB[used:], tables.words, above_TxB)
    tokens_TxB = jnp.where(positions_Tx1 < lengths_B[None], words_TxB, num_words)
    tree = (jnp.where(width_MxB > 0, x, -1).T for x in (symbol_MxB, start_MxB, width_MxB))
    return tokens_TxB.T, lengths_B, Tree(*tree)
