"""Probabilistic grammars as tables: their symbols, their levels, and random grammars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import jax
import numpy as np

from jaxflat.languages.categorical import random_rows

RAREST = 1e-12  # smallest probability of a rule in a random levelled grammar


@dataclass(frozen=True, eq=False)
class Grammar:
    """A probabilistic grammar in Chomsky normal form, as float64 tables.

    The root is A with probability start_N[A]. A -> B C has probability rules_NxNxN[A, B, C], and
    A -> word has emissions_NxV[A, word]. For every A, its rules and emissions together sum to 1.
    `levels` are the sizes of consecutive groups of non-terminals: both children of a symbol are in
    the next group. A single group imposes nothing: its rules may have any children.
    """

    nonterminals: tuple[str, ...]
    words: tuple[str, ...]
    start_N: np.ndarray
    rules_NxNxN: np.ndarray
    emissions_NxV: np.ndarray
    levels: tuple[int, ...]


def level_slices(levels: Sequence[int]) -> list[slice]:
    """Return the slice of all symbols that each level occupies."""
    ends = accumulate(levels)
    return [slice(end - size, end) for end, size in zip(ends, levels, strict=True)]


def level_order(grammar: Grammar) -> Grammar:
    """Return the same grammar with its non-terminals grouped by level.

    The order within a level does not change. Every rule of positive probability puts its children
    one level below their parent. Symbols that no chain of rules connects do not constrain each
    other: the top of each connected set is at level 0. If the constraints contradict each other, as
    in every recursive grammar, the order does not change and all non-terminals are one group.
    """
    level_N = _levels(grammar.rules_NxNxN)
    if level_N is None:
        return replace(grammar, levels=(len(grammar.nonterminals),))
    order_N = np.argsort(level_N, kind="stable")
    return Grammar(
        nonterminals=tuple(grammar.nonterminals[A] for A in order_N),
        words=grammar.words,
        start_N=grammar.start_N[order_N],
        rules_NxNxN=grammar.rules_NxNxN[np.ix_(order_N, order_N, order_N)],
        emissions_NxV=grammar.emissions_NxV[order_N],
        levels=tuple(np.bincount(level_N).tolist()),
    )


def _levels(rules_NxNxN: np.ndarray) -> list[int] | None:
    """Return the level of each non-terminal, or None if child = parent + 1 has no solution."""
    steps: list[set[tuple[int, int]]] = [set() for _ in rules_NxNxN]  # (symbol, levels below)
    for A, *children in np.argwhere(rules_NxNxN > 0).tolist():
        for child in children:
            steps[A].add((child, 1))
            steps[child].add((A, -1))
    levels = {}
    for first in range(len(steps)):
        if first in levels:
            continue
        found, queue = {first: 0}, [first]
        for A in queue:
            for B, step in steps[A]:
                if B not in found:
                    found[B] = found[A] + step
                    queue.append(B)
                elif found[B] != found[A] + step:
                    return None
        top = min(found.values())
        levels |= {A: level - top for A, level in found.items()}
    return [levels[A] for A in range(len(steps))]


def sum_to_one(weights_C: np.ndarray) -> np.ndarray:
    """Return the weights divided by their sum, so that `math.fsum` of the result is exactly 1.0.

    Weights whose `math.fsum` is already 1.0 do not change.
    """
    total = math.fsum(weights_C[weights_C > 0].tolist())
    if total == 1:
        return weights_C
    probs_C = weights_C / total
    # Correcting the largest probability rounds by at most half a unit in the last place of 1.
    probs_C[probs_C.argmax()] -= math.fsum([*probs_C[probs_C > 0].tolist(), -1.0])
    return probs_C


def random_levelled_grammar(
    seed: int,
    *,
    level_sizes: Sequence[int],
    num_words: int,
    emission_probability: float | Sequence[float],
    rule_concentration: float,
    emission_concentration: float,
) -> Grammar:
    """Return a random grammar of sentences of 2..2^(levels - 1) words.

    The root is uniform over level 0; rules and emissions are Dirichlet rows. Level 0 has only
    rules, and the last level only words. A symbol of a level between becomes a word with
    `emission_probability`: one number, or one for each level between. Probabilities below 1e-12 are
    set to 0: no sample would show such rules, and float32 cannot hold products of them. Names are
    S1.. in level 0, A<level>_<i> below, and w000.. for words. Raises ValueError on bad sizes,
    probabilities or concentrations.
    """
    sizes, between = tuple(level_sizes), max(len(level_sizes) - 2, 0)
    one = isinstance(emission_probability, int | float)
    chances = (emission_probability,) * between if one else tuple(emission_probability)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"level_sizes must be two or more sizes >= 1; got {sizes}")
    if num_words < 2:
        raise ValueError(f"num_words must be >= 2; got {num_words}")
    if len(chances) != between or not all(0 <= chance < 1 for chance in chances):
        raise ValueError(
            f"emission_probability must be in [0, 1): one number, or one for each of {between} "
            f"levels; got {emission_probability}"
        )
    if min(rule_concentration, emission_concentration) <= 0:
        raise ValueError(
            "rule_concentration and emission_concentration must be > 0; "
            f"got {rule_concentration}, {emission_concentration}"
        )
    N, parts = sum(sizes), level_slices(sizes)
    rules_NxNxN, emissions_NxV = np.zeros((N, N, N)), np.zeros((N, num_words))
    keys_Lx2 = jax.random.split(jax.random.key(seed), (len(sizes), 2))
    for level, chance in enumerate((0.0, *chances, 1.0)):
        here = parts[level]
        if chance < 1:
            below, size = parts[level + 1], sizes[level + 1]
            rows = random_rows(keys_Lx2[level, 0], rule_concentration, (sizes[level], size**2))
            rows = (1 - chance) * np.asarray(rows, np.float64)
            rules_NxNxN[here, below, below] = rows.reshape(-1, size, size)
        if chance > 0:
            shape = sizes[level], num_words
            rows = random_rows(keys_Lx2[level, 1], emission_concentration, shape)
            emissions_NxV[here] = chance * np.asarray(rows, np.float64)
    table = np.concatenate([rules_NxNxN.reshape(N, N * N), emissions_NxV], axis=1)
    table = np.stack([sum_to_one(row) for row in np.where(table < RAREST, 0, table)])
    return Grammar(
        nonterminals=_symbol_names(sizes),
        words=_word_names(num_words),
        start_N=sum_to_one(np.where(np.arange(N) < sizes[0], 1 / sizes[0], 0.0)),
        rules_NxNxN=table[:, : N * N].reshape(N, N, N),
        emissions_NxV=table[:, N * N :],
        levels=sizes,
    )


def random_recursive_grammar(
    seed: int,
    *,
    num_nonterminals: int,
    num_words: int,
    emission_probability: float,
    rule_concentration: float,
    emission_concentration: float,
) -> Grammar:
    """Return a random grammar in which every non-terminal may have any two children.

    The root is uniform; rules are Dirichlet rows over all pairs. Every symbol becomes a word with
    `emission_probability`. Raises ValueError on bad sizes, probabilities or concentrations.
    """
    N = num_nonterminals
    if min(N, num_words) < 2:
        raise ValueError(f"num_nonterminals and num_words must be >= 2; got {N}, {num_words}")
    if not 0 < emission_probability < 1:
        raise ValueError(
            f"emission_probability must be between 0 and 1; got {emission_probability}"
        )
    if min(rule_concentration, emission_concentration) <= 0:
        raise ValueError(
            "rule_concentration and emission_concentration must be > 0; "
            f"got {rule_concentration}, {emission_concentration}"
        )
    rule_key, emission_key = jax.random.split(jax.random.key(seed))
    rules_NxP = np.asarray(random_rows(rule_key, rule_concentration, (N, N * N)), np.float64)
    emissions_NxV = random_rows(emission_key, emission_concentration, (N, num_words))
    return Grammar(
        nonterminals=tuple(f"A{i}" for i in range(N)),
        words=_word_names(num_words),
        start_N=np.full(N, 1 / N),
        rules_NxNxN=(1 - emission_probability) * rules_NxP.reshape(N, N, N),
        emissions_NxV=emission_probability * np.asarray(emissions_NxV, np.float64),
        levels=(N,),
    )


def _word_names(num_words: int) -> tuple[str, ...]:
    return tuple(f"w{v:0{len(str(num_words - 1))}}" for v in range(num_words))


def _symbol_names(sizes: tuple[int, ...]) -> tuple[str, ...]:
    below = [f"A{level}_{i}" for level, size in enumerate(sizes) if level for i in range(size)]
    return (*(f"S{i + 1}" for i in range(sizes[0])), *below)
