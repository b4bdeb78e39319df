"""Frequencies in samples against exact marginals, at the sizes of the paper.

Words of one sentence depend on each other. So every sentence counts once, by one of its words,
nodes or transitions, drawn at random.
"""

from functools import cache

import jax
import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from jaxflat.languages.grammars.grammar import Grammar, random_levelled_grammar
from jaxflat.languages.grammars.pcfg import make_pcfg
from jaxflat.languages.hmm import Hmm, random_hmm

SEEDS, SENTENCES = range(20), 6_000
Counts = dict[str, np.ndarray]


def assert_frequencies(samples: list[Counts], probs: Counts) -> None:
    """Require p > 0.001 for all samples together, and for 20 p-values to be uniform."""
    for name, probs_C in probs.items():
        np.testing.assert_allclose(probs_C.sum(), 1, rtol=1e-6)
        counts_SxC = np.stack([counts[name] for counts in samples])
        assert counts_SxC.sum() == len(SEEDS) * SENTENCES
        assert counts_SxC[:, probs_C == 0].sum() == 0
        together = p_value(counts_SxC.sum(axis=0), probs_C)
        alone = [p_value(counts_C, probs_C) for counts_C in counts_SxC]
        uniform = kstest(alone, "uniform").pvalue
        assert together > 1e-3, name
        assert uniform > 1e-3, name


def p_value(counts_C: np.ndarray, probs_C: np.ndarray) -> float:
    """Return p of a chi-square test that pools outcomes expected fewer than 10 times."""
    expected_C = probs_C / probs_C.sum() * counts_C.sum()
    rare_C = expected_C < 10
    groups = [(x[~rare_C], [x[rare_C].sum()]) for x in (counts_C, expected_C)]
    counts, expected = (np.concatenate(group) for group in groups)
    if expected[-1] < 10:  # then pool it with the smallest of the others
        counts, expected = (np.append(x[:-2], x[-2:].sum()) for x in (counts, expected))
    return chisquare(counts, expected).pvalue


T, MIN_LENGTH, V = 32, 5, 200


@cache
def grammar() -> Grammar:
    return random_levelled_grammar(
        0,
        level_sizes=(9, 8, 8, 8, 8, 8),
        num_words=V,
        emission_probability=0.2,
        rule_concentration=0.05,
        emission_concentration=0.05,
    )


def yields() -> np.ndarray:
    """Return P(A yields n words), SxN, n from 0."""
    rules_NxNxN, N = grammar().rules_NxNxN, len(grammar().nonterminals)
    yields_SxN = np.zeros((T + 1, N))
    yields_SxN[1] = grammar().emissions_NxV.sum(axis=1)
    for n in range(2, T + 1):
        pairs_NxN = yields_SxN[1:n].T @ yields_SxN[1:n][::-1]
        yields_SxN[n] = rules_NxNxN.reshape(N, -1) @ pairs_NxN.ravel()
    return yields_SxN


def expected_nodes(roots_SxN: np.ndarray, yields_SxN: np.ndarray) -> np.ndarray:
    """Return the weights of nodes A above n words, SxN, given the roots' weights, top down.

    Weights exclude the subtree below the node: times P(A yields n words) they are expected counts.
    """
    rules_NxNxN, nodes_SxN = grammar().rules_NxNxN, roots_SxN.copy()
    left_SxNxN = np.einsum("abc,jc->jab", rules_NxNxN, yields_SxN)
    right_SxNxN = np.einsum("abc,kb->kac", rules_NxNxN, yields_SxN)
    for n in range(T, 1, -1):
        for k in range(1, n):
            nodes_SxN[k] += nodes_SxN[n] @ left_SxNxN[n - k]
            nodes_SxN[n - k] += nodes_SxN[n] @ right_SxNxN[k]
    return nodes_SxN


def pcfg_probs() -> Counts:
    """Return frequencies given the bounds on the length; inner nodes have the rules."""
    g, yields_SxN = grammar(), yields()
    roots_SxN = np.repeat(g.start_N[None], T + 1, axis=0)
    roots_SxN[:MIN_LENGTH] = 0
    total = (roots_SxN * yields_SxN).sum()
    roots_SxN /= total
    sizes_Sx1 = np.maximum(np.arange(T + 1), 2)[:, None]
    pairs_SxNxN = np.zeros((T + 1, *g.rules_NxNxN.shape[1:]))
    for n in range(2, T + 1):
        pairs_SxNxN[n] = yields_SxN[1:n].T @ yields_SxN[1:n][::-1]
    leaves_N = expected_nodes(roots_SxN / sizes_Sx1, yields_SxN)[1]
    inner_SxN = expected_nodes(roots_SxN / (sizes_Sx1 - 1), yields_SxN)
    rules = [
        np.einsum("na,abc,nbc->abc", nodes_SxN, g.rules_NxNxN, pairs_SxNxN, optimize=True)
        for nodes_SxN in (roots_SxN, inner_SxN)
    ]
    return {
        "length": (roots_SxN * yields_SxN).sum(axis=1),
        "word": leaves_N @ g.emissions_NxV,
        "rule of the root": rules[0].ravel(),
        "rule": rules[1].ravel(),
    }


def pcfg_counts(sentences, rng: np.random.Generator) -> Counts:
    """The places of nodes determine the tree: a node's children are the two within its place."""
    N = len(grammar().nonterminals)
    lengths_B, tokens_BxT = np.asarray(sentences.lengths_B), np.asarray(sentences.tokens_BxT)
    symbol, start, width = (
        np.asarray(getattr(sentences.latents, f"{name}_BxM"))
        for name in ("symbol", "start", "width")
    )
    B = np.arange(len(lengths_B))
    symbol_at = np.full((len(B), T + 1, T + 1), -1)  # by start and end; -1 without a node
    rows, nodes = np.nonzero(width > 0)
    starts, ends = start[rows, nodes], (start + width)[rows, nodes]
    symbol_at[rows, starts, ends] = symbol[rows, nodes]

    def rules_above(node_B: np.ndarray) -> np.ndarray:
        first_B = start[B, node_B]
        end_B = first_B + width[B, node_B]
        has_left, has_right = symbol_at[B, first_B] >= 0, symbol_at[B, :, end_B] >= 0
        between = np.arange(T + 1)
        inside = (between > first_B[:, None]) & (between < end_B[:, None])
        split_BxS = has_left & has_right & inside
        assert (split_BxS.sum(axis=1) == 1).all()
        k_B = split_BxS.argmax(axis=1)
        left_B, right_B = symbol_at[B, first_B, k_B], symbol_at[B, k_B, end_B]
        rule_B = (symbol[B, node_B] * N + left_B) * N + right_B
        return np.bincount(rule_B, minlength=N**3)

    root_B = np.argmax(width, axis=1)
    assert (width[B, root_B] == lengths_B).all()
    inner_B = np.argmax(np.where(width > 1, rng.random(width.shape), -1), axis=1)
    return {
        "length": np.bincount(lengths_B, minlength=T + 1),
        "word": np.bincount(tokens_BxT[B, rng.integers(0, lengths_B)], minlength=V),
        "rule of the root": rules_above(root_B),
        "rule": rules_above(inner_B),
    }


@pytest.mark.slow
def test_pcfg():
    language = make_pcfg(grammar(), length=T, min_length=MIN_LENGTH, tasks=[])
    samples = []
    for seed in SEEDS:
        sentences = language.sample(jax.random.key(seed), SENTENCES)
        samples.append(pcfg_counts(sentences, np.random.default_rng(seed)))
    assert_frequencies(samples, pcfg_probs())


def hmm_probs(hmm: Hmm) -> Counts:
    """Positions are uniform over a sentence's words, or over its neighbours, as are lengths."""
    start_K, transitions_KxK, emissions_KxV = (
        np.asarray(x, np.float64) for x in (hmm.start_K, hmm.transitions_KxK, hmm.emissions_KxV)
    )
    lengths = np.arange(hmm.min_length, hmm.length + 1)
    length_S = np.isin(np.arange(hmm.length + 1), lengths) / len(lengths)
    states_TxK = [start_K]
    for _ in range(hmm.length - 1):
        states_TxK.append(states_TxK[-1] @ transitions_KxK)
    word_T = sum((np.arange(hmm.length) < n) / n for n in lengths) / len(lengths)
    pair_T = sum((np.arange(hmm.length) < n - 1) / (n - 1) for n in lengths) / len(lengths)
    return {
        "length": length_S,
        "word": word_T @ states_TxK @ emissions_KxV,
        "transition": ((pair_T @ states_TxK)[:, None] * transitions_KxK).ravel(),
        "state and word": ((word_T @ states_TxK)[:, None] * emissions_KxV).ravel(),
    }


def hmm_counts(hmm: Hmm, sentences, rng: np.random.Generator) -> Counts:
    K = hmm.num_symbols
    tokens_BxT, lengths_B, states_BxT = map(np.asarray, jax.tree.leaves(sentences))
    B = np.arange(len(lengths_B))
    t_B, s_B = rng.integers(0, lengths_B), rng.integers(0, lengths_B - 1)
    word_B = tokens_BxT[B, t_B]
    return {
        "length": np.bincount(lengths_B, minlength=hmm.length + 1),
        "word": np.bincount(word_B, minlength=V),
        "transition": np.bincount(states_BxT[B, s_B] * K + states_BxT[B, s_B + 1], minlength=K * K),
        "state and word": np.bincount(states_BxT[B, t_B] * V + word_B, minlength=K * V),
    }


@pytest.mark.slow
def test_hmm():
    hmm = random_hmm(
        0,
        num_states=100,
        num_words=V,
        length=16,
        min_length=4,
        transition_concentration=0.05,
        emission_concentration=0.05,
        tasks=(),
    )
    samples = []
    for seed in SEEDS:
        sentences = hmm.sample(jax.random.key(seed), SENTENCES)
        samples.append(hmm_counts(hmm, sentences, np.random.default_rng(seed)))
    assert_frequencies(samples, hmm_probs(hmm))
