"""Exact sampling of grammars with levels, all nodes of a level at once.

The length comes first, then from the root down how many words are below each left child, which
symbol it is, and which symbol its sibling is: each a draw from a table made once. No tree is ever
rejected or cut, whatever the limits on the length.
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxflat.languages.alias import alias_table, draw_alias
from jaxflat.languages.grammars.derivations import Tree
from jaxflat.languages.grammars.grammar import Grammar, level_slices


class Tables(NamedTuple):
    """Alias tables (`alias`), rows first. Level l has K symbols over C of level l + 1.

    roots: one row; outcome n * K + A, a sentence of n words below A.
    splits[l]: row A * (widths of A, from 0) + n; outcome (k - 1) * C + B, A -> B with k words.
    rights[l]: row (A * C + B) * (widths of a child, from 0) + j; outcome D, A -> B D with j words.
    words: row A, of all symbols; outcome the word.
    """

    roots: Array
    splits: tuple[Array, ...]
    rights: tuple[Array, ...]
    words: Array


def branching_tables(grammar: Grammar, min_length: int, max_length: int) -> Tables:
    """Tables for sentences of min_length to max_length words of a grammar with levels.

    With Y_n(A) = P(A yields n words): Y_1(A) = sum_v P(A -> v), Y_n(A) = sum_{k,B,D} P(A -> B D)
    Y_k(B) Y_{n-k}(D). Raises ValueError where there is no such sentence.
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
    return Tables(
        roots=jnp.asarray(alias_table(roots_SxK.reshape(1, -1))),
        splits=tuple(jnp.asarray(alias_table(table)) for table in splits),
        rights=tuple(jnp.asarray(alias_table(table)) for table in rights),
        words=jnp.asarray(alias_table(grammar.emissions_NxV)),
    )


def sample_levelled(
    tables: Tables, levels: tuple[int, ...], num_words: int, T: int, key: Array, batch_size: int
) -> tuple[Array, Array, Tree]:
    """(tokens_BxT, lengths_B, trees): sentence b is a function of (key, b) alone.

    Nodes are level by level, 2^l of level l in their order, -1 where there is none.
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
    # Past the end goes what is no leaf, so that nothing is written for it.
    flat_MxB = place_MxB * batch_size + jnp.arange(batch_size, dtype=jnp.int32)[None]
    above = jnp.zeros(T * batch_size, jnp.int32).at[flat_MxB].set(symbol_MxB, mode="drop")
    above_TxB = above.reshape(T, batch_size)
    words_TxB = draw_alias(bits_RxB[used:], tables.words, above_TxB)
    tokens_TxB = jnp.where(positions_Tx1 < lengths_B[None], words_TxB, num_words)
    tree = (jnp.where(width_MxB > 0, x, -1).T for x in (symbol_MxB, start_MxB, width_MxB))
    return tokens_TxB.T, lengths_B, Tree(*tree)
