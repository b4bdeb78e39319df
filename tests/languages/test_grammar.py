"""Levels of grammars, and random grammars with levels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxflat.languages.grammars.grammar import (
    Grammar,
    level_order,
    random_levelled_grammar,
    sum_to_one,
)
from tests.support.counts import FULL

SMALL = {
    "level_sizes": (3, 4, 2, 3),
    "num_words": 12,
    "emission_probability": (0.3, 0.6),
    "rule_concentration": 0.5,
    "emission_concentration": 0.2,
}


def grammar_of(pairs: dict[str, list[str]], roots: str) -> Grammar:
    """Return a grammar of one-letter non-terminals; those without pairs emit the only word."""
    names = tuple(pairs)
    rules_NxNxN = np.zeros((len(names),) * 3)
    emissions_NxV = np.zeros((len(names), 1))
    for A, right in enumerate(pairs.values()):
        emissions_NxV[A] = not right
        for B, C in right:
            rules_NxNxN[A, names.index(B), names.index(C)] = 1 / len(right)
    start_N = np.array([name in roots for name in names]) / len(roots)
    return Grammar(names, ("word",), start_N, rules_NxNxN, emissions_NxV, (len(names),))


def by_name(grammar: Grammar) -> dict[tuple[str, ...], float]:
    """Return the probability of every possible rule and of every root."""
    names, found = grammar.nonterminals, {}
    for A in np.flatnonzero(grammar.start_N):
        found["", names[A]] = grammar.start_N[A]
    for A, B, C in np.argwhere(grammar.rules_NxNxN):
        found[names[A], names[B], names[C]] = grammar.rules_NxNxN[A, B, C]
    for A, word in np.argwhere(grammar.emissions_NxV):
        found[names[A], grammar.words[word]] = grammar.emissions_NxV[A, word]
    return found


def group_of(grammar: Grammar) -> np.ndarray:
    return np.repeat(np.arange(len(grammar.levels)), grammar.levels)


@pytest.mark.parametrize("seed", range(5 if FULL else 2))
@pytest.mark.slow
def test_levels_are_found_again(seed):
    grammar = random_levelled_grammar(seed, **SMALL)
    order = np.random.default_rng(seed).permutation(len(grammar.nonterminals))
    shuffled = Grammar(
        nonterminals=tuple(np.array(grammar.nonterminals)[order].tolist()),
        words=grammar.words,
        start_N=grammar.start_N[order],
        rules_NxNxN=grammar.rules_NxNxN[order][:, order][:, :, order],
        emissions_NxV=grammar.emissions_NxV[order],
        levels=(len(order),),
    )
    found = level_order(shuffled)
    assert found.levels == SMALL["level_sizes"]
    assert by_name(found) == by_name(grammar)
    again = level_order(found)
    assert again.nonterminals == found.nonterminals
    for A, B, C in np.argwhere(found.rules_NxNxN):
        group = group_of(found)
        assert group[B] == group[C] == group[A] + 1


@pytest.mark.parametrize(
    ("pairs", "roots", "names", "levels"),
    [
        # Roots on two levels.
        ({"S": ["AB"], "A": ["XX"], "X": [], "B": []}, "SA", "SABX", (1, 2, 1)),
        # A level below the root of another symbol: X is above S.
        ({"S": [], "X": ["SS"]}, "S", "XS", (1, 1)),
        # Two sets without a rule between them each have their own top.
        ({"A": ["BB"], "B": [], "C": ["DD"], "D": ["EE"], "E": []}, "AC", "ACBDE", (2, 2, 1)),
        # No pairs at all.
        ({"A": [], "B": []}, "AB", "AB", (2,)),
        # Direct recursion; indirect recursion; a child on two levels.
        ({"A": ["AB", "BB"], "B": []}, "A", "AB", (2,)),
        ({"A": ["BC"], "B": ["AC", "CC"], "C": []}, "A", "ABC", (3,)),
        ({"C": [], "B": ["CC"], "A": ["BC"]}, "A", "CBA", (3,)),
    ],
)
def test_levels_by_hand(pairs, roots, names, levels):
    grammar = grammar_of(pairs, roots)
    found = level_order(grammar)
    assert ("".join(found.nonterminals), found.levels) == (names, levels)
    assert by_name(found) == by_name(grammar)


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(
    st.integers(2, 6).flatmap(
        lambda N: st.tuples(st.just(N), st.sets(st.tuples(*[st.integers(0, N - 1)] * 3)))
    )
)
def test_levels_exist_where_the_equations_have_a_solution(case):
    """level(child) - level(parent) = 1 by least squares: solvable if the residual is 0."""
    N, rules = case
    rules_NxNxN = np.zeros((N, N, N))
    equations = []
    for A, B, C in rules:
        rules_NxNxN[A, B, C] = 1
        equations += [np.eye(N)[B] - np.eye(N)[A], np.eye(N)[C] - np.eye(N)[A]]
    names = tuple(f"A{i}" for i in range(N))
    grammar = Grammar(names, (), np.ones(N) / N, rules_NxNxN, np.zeros((N, 0)), (N,))
    found = level_order(grammar)
    assert by_name(found) == by_name(grammar)
    assert min(found.levels) > 0
    assert sum(found.levels) == N
    left_over = 0.0
    if equations:
        matrix, ones = np.array(equations), np.ones(len(equations))
        left_over = np.abs(matrix @ np.linalg.lstsq(matrix, ones)[0] - ones).max()
    if left_over < 1e-6:
        group = group_of(found)
        for A, B, C in np.argwhere(found.rules_NxNxN):
            assert group[B] == group[C] == group[A] + 1
    else:
        assert (found.levels, found.nonterminals) == ((N,), names)


@pytest.mark.slow
def test_random_grammars_have_the_shape_asked_for():
    grammar = random_levelled_grammar(0, **SMALL)
    S, N = SMALL["level_sizes"], sum(SMALL["level_sizes"])
    assert grammar.levels == S
    assert grammar.nonterminals[:5] == ("S1", "S2", "S3", "A1_0", "A1_1")
    assert grammar.nonterminals[-1] == "A3_2"
    assert grammar.words[:2] == ("w00", "w01")
    np.testing.assert_allclose(grammar.start_N[:3], 1 / 3)
    assert grammar.emissions_NxV.shape == (N, 12)
    np.testing.assert_allclose(
        grammar.emissions_NxV.sum(axis=1), np.repeat([0, 0.3, 0.6, 1], S), rtol=1e-6
    )
    for table in (grammar.start_N, grammar.rules_NxNxN, grammar.emissions_NxV):
        assert table.dtype == np.float64
        assert (table[table > 0] > np.finfo(np.float32).tiny / 2).all()
    assert math.fsum(grammar.start_N) == 1
    for rules_NxN, emissions_V in zip(grammar.rules_NxNxN, grammar.emissions_NxV, strict=True):
        assert math.fsum([*rules_NxN.flat, *emissions_V]) == 1
    same, other = (random_levelled_grammar(seed, **SMALL) for seed in (0, 1))
    assert by_name(same) == by_name(grammar) != by_name(other)


def test_a_probability_for_each_level_and_sizes_from_json():
    keywords = SMALL | {"num_words": 200, "emission_probability": 0.2}
    grammar = random_levelled_grammar(0, **keywords)
    assert (grammar.words[0], grammar.words[-1]) == ("w000", "w199")
    lists = {"level_sizes": list(SMALL["level_sizes"]), "emission_probability": [0.2, 0.2]}
    assert by_name(random_levelled_grammar(0, **(keywords | lists))) == by_name(grammar)
    two = random_levelled_grammar(0, **(keywords | {"level_sizes": (2, 3)}))
    np.testing.assert_allclose(two.emissions_NxV.sum(axis=1), [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level_sizes": (3,)}, r"level_sizes must be two or more sizes >= 1; got \(3,\)"),
        ({"level_sizes": (3, 0)}, r"level_sizes must be two or more sizes >= 1; got \(3, 0\)"),
        ({"num_words": 1}, "num_words must be >= 2; got 1"),
        ({"emission_probability": 1.0}, r"in \[0, 1\): one number, .* of 2 levels; got 1.0"),
        ({"emission_probability": (0.5,)}, r"one for each of 2 levels; got \(0.5,\)"),
        ({"rule_concentration": 0.0}, r"rule_concentration .* > 0; got 0.0, 0.2"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        random_levelled_grammar(0, **(SMALL | change))


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(1e-30, 1e30), min_size=1))
def test_sum_to_one_is_exact_and_final(weights):
    probs = sum_to_one(np.array([0.0, *weights]))
    assert math.fsum(probs) == 1
    assert (probs >= 0).all()
    np.testing.assert_array_equal(sum_to_one(probs), probs)
    np.testing.assert_allclose(probs[1:], np.array(weights) / math.fsum(weights), rtol=1e-12)
