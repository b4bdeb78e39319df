"""Inference by levels against the dense chart, and against a chart in plain NumPy."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from jaxflat.languages.grammars.derivations import LevelTables, YieldTables
from jaxflat.languages.grammars.grammar import Grammar, random_levelled_grammar
from jaxflat.languages.grammars.pcfg import Pcfg, make_pcfg
from jaxflat.languages.sentences import Sentences
from tests.support.counts import in_full
from tests.support.enumeration import derivations, small_levelled


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def in_dtype(language: Pcfg, dtype) -> Pcfg:
    tables = ("start_N", "rules_NxNxN", "emissions_NxV")
    return dataclasses.replace(
        language, **{name: np.asarray(getattr(language, name), dtype) for name in tables}
    )


def by_hand(seed: int, levels: tuple[int, ...], roots: list[int], zeros: float = 0.0) -> Grammar:
    """Return a grammar whose symbols all emit words; a share `zeros` of probabilities is 0."""
    rng, N, V = np.random.default_rng(seed), sum(levels), 5
    level_N = np.repeat(np.arange(len(levels)), levels)
    below_NxN = level_N[:, None] + 1 == level_N[None]
    allowed_NxNxN = below_NxN[:, :, None] & below_NxN[:, None, :]
    table = rng.exponential(size=(N, N * N + V)) * (rng.random((N, N * N + V)) >= zeros)
    table[:, : N * N] *= allowed_NxNxN.reshape(N, -1)
    table[:, -1] += 0.01
    table /= table.sum(axis=1, keepdims=True)
    start_N = np.where(np.isin(np.arange(N), roots), 1 / len(roots), 0.0)
    rules, emissions = table[:, : N * N].reshape(N, N, N), table[:, N * N :]
    names = tuple(f"A{i}" for i in range(N)), tuple(f"w{v}" for v in range(V))
    return Grammar(*names, start_N, rules, emissions, levels)


def of_hand(grammar: Grammar, length: int) -> Pcfg:
    spans = [(s, e) for s in range(length) for e in range(s + 1, length + 1)]
    language = make_pcfg(grammar, length=length, min_length=1, tasks=[(), *spans])
    return dataclasses.replace(
        language,
        start_N=grammar.start_N,
        rules_NxNxN=grammar.rules_NxNxN,
        emissions_NxV=grammar.emissions_NxV,
    )


LEVELLED = {
    "two_levels": lambda: small_levelled(0, (2, 3), num_words=4, length=2),
    "two_levels_and_room": lambda: small_levelled(1, (3, 2), num_words=4, length=5),
    "cut_to_7": lambda: small_levelled(2, (2, 2, 2, 2, 2), num_words=4, length=7),
    "cut_to_3": lambda: small_levelled(3, (2, 3, 2, 3, 2), num_words=4, length=3),
    "all_of_8": lambda: small_levelled(4, (3, 4, 3, 2), num_words=6, length=8),
    "words_at_the_top": lambda: of_hand(by_hand(5, (2, 3, 2), roots=[0, 1]), 4),
    "one_root_of_two": lambda: of_hand(by_hand(6, (3, 2, 2, 2), roots=[1]), 6),
    "zeros": lambda: of_hand(by_hand(7, (3, 4, 4, 3), roots=[0, 2], zeros=0.7), 8),
}


@cache
def languages(name: str) -> tuple[Pcfg, Pcfg]:
    """Return the language with levels, and the same language without levels."""
    language = LEVELLED[name]()
    assert isinstance(language.tables, LevelTables)
    return language, dataclasses.replace(language, tables=None, levels=(language.num_symbols,))


@cache
def batch(name: str) -> Sentences:
    """Return twelve sampled sentences, then four of uniform words, which may be impossible."""
    language, _ = languages(name)
    with jax.enable_x64(False):
        sampled = language.sample(jax.random.key(1), 12)
    rng, T, V = np.random.default_rng(0), language.max_length, language.num_words
    lengths_B = rng.integers(1, T + 1, 4).astype(np.int32)
    tokens_BxT = np.where(np.arange(T) < lengths_B[:, None], rng.integers(0, V, (4, T)), V)
    tokens_BxT = np.concatenate([sampled.tokens_BxT, tokens_BxT.astype(np.int32)])
    latents = jax.tree.map(
        lambda x: np.pad(x, ((0, 4), (0, 0)), constant_values=-1), sampled.latents
    )
    return Sentences(tokens_BxT, np.append(sampled.lengths_B, lengths_B), latents)


# "zeros" also has words at the top, and roots that are only some symbols of the top.
SOME = ("two_levels", "two_levels_and_room", "cut_to_7", "zeros")


@pytest.mark.parametrize("name", [*SOME, *in_full(*sorted(LEVELLED.keys() - set(SOME)))])
@pytest.mark.slow
def test_conditionals_equal_those_of_the_dense_chart(name):
    """At all positions, given all other words, and given some of them."""
    language, dense = languages(name)
    sentences, rng = batch(name), np.random.default_rng(2)
    V, T = language.num_words, language.max_length
    words_BxT = np.arange(T) < sentences.lengths_B[:, None]
    for share in (0.0, 0.4, 1.0):
        masked_BxT = words_BxT & (rng.random(words_BxT.shape) < share)
        inputs_BxT = np.where(masked_BxT, V + 1, sentences.tokens_BxT)
        found, expected = (
            np.exp(x.conditional_log_probs(inputs_BxT, sentences.lengths_B, masked_BxT))
            for x in (language, dense)
        )
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        assert share == 1 or np.ptp(found[words_BxT], axis=0).max() > 0.01


def _compare_place(name: str, task: str) -> int:
    """Compare posteriors where the latent label is valid, and official labels everywhere.

    Returns the number of valid labels.
    """
    sentences, (ours, dense) = batch(name), (x.tasks[task] for x in languages(name))
    _, valid_B = map(np.asarray, ours.labels(sentences))
    found_BxC, expected_BxC = (np.asarray(x.posterior(sentences)) for x in (ours, dense))
    np.testing.assert_allclose(found_BxC[valid_B], expected_BxC[valid_B], rtol=0, atol=1e-12)
    official, of_dense = (x.labels(sentences, "official") for x in (ours, dense))
    jax.tree.map(np.testing.assert_array_equal, official, of_dense)
    long_enough_B = sentences.lengths_B >= 5
    assert np.asarray(official[1])[valid_B & long_enough_B].all()
    assert not np.asarray(official[1])[~long_enough_B].any()
    return valid_B.sum()


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("cut_to_7", ["root", "span_0_2"]),
        ("zeros", ["root", "span_0_2"]),
        *in_full(
            ("all_of_8", ["root", "span_0_4"]),
            ("words_at_the_top", ["root", "span_0_1"]),
            ("one_root_of_two", ["root", "span_2_4"]),
        ),
    ],
)
@pytest.mark.slow
def test_labels_equal_those_of_the_dense_chart(name, names):
    for task in names:
        assert _compare_place(name, task) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",  # up to six words, because each place compiles separately
    [
        *("two_levels", "words_at_the_top"),
        *in_full("two_levels_and_room", "cut_to_3", "one_root_of_two"),
    ],
)
def test_all_labels_equal_those_of_the_dense_chart(name):
    num_valid = 0
    for task in languages(name)[0].tasks:
        num_valid += _compare_place(name, task)
        jax.clear_caches()  # every place is another program, and they are too many to cache
    lengths_B = batch(name).lengths_B[:12]
    words, inner = lengths_B.sum(), (lengths_B - 1).sum()
    assert num_valid == words + inner + 12  # each root counts again as place ()


def test_roots_below_the_top_have_the_dense_chart():
    """Inference by levels needs roots of level 0; compared with the list of all derivations."""
    language = of_hand(by_hand(8, (2, 2), roots=[1, 2]), 3)
    assert isinstance(language.tables, YieldTables)
    assert language.levels == (2, 2)
    tokens_BxT = np.array([[0, 1, 5], [2, 5, 5], [3, 4, 5]], np.int32)
    lengths_B = np.array([2, 1, 2], np.int32)
    p_BxTxV = np.exp(language.conditional_log_probs(tokens_BxT, lengths_B))
    for tokens_T, n, p_TxV in zip(tokens_BxT, lengths_B.tolist(), p_BxTxV, strict=True):
        exact = derivations(language, n)
        for t in range(n):
            expected_V = exact.conditional(tuple(tokens_T[:n]), t, set())
            np.testing.assert_allclose(p_TxV[t], expected_V, rtol=0, atol=1e-12)
    sentences = language.sample(jax.random.key(0), 1000)
    assert set(np.unique(sentences.lengths_B)) == {1, 2}
    assert set(np.unique(sentences.latents.symbol_BxM[:, 0])) == {1, 2}


PAPER = {  # level sizes, max_length, and (sentence, position) of the compared distributions
    "16_words": ((9, 10, 10, 10, 10), 16, [(0, 0), (0, 7), (1, 15), (2, 4), (3, 2), (4, 1)]),
    "32_words": ((9, 8, 8, 8, 8, 8), 32, [(0, 0), (1, 31), (2, 17), (3, 5)]),
}


@cache
def paper(name: str) -> tuple[Pcfg, np.ndarray, np.ndarray, np.ndarray]:
    """Return (language in float64, tokens_BxT, lengths_B, masked_BxT), three of six masked."""
    level_sizes, T, _ = PAPER[name]
    grammar = random_levelled_grammar(
        0,
        level_sizes=level_sizes,
        num_words=200,
        emission_probability=0.1,
        rule_concentration=0.1,
        emission_concentration=0.1,
    )
    language = make_pcfg(grammar, length=T, min_length=2, tasks=[()])
    with jax.enable_x64(False):
        sentences = language.sample(jax.random.key(0), 200)
    lengths_B = np.asarray(sentences.lengths_B)
    longest = np.argsort(-lengths_B, kind="stable")[:4]
    chosen = np.append(longest, np.flatnonzero(lengths_B < T // 2)[:2])
    tokens_BxT, lengths_B = np.asarray(sentences.tokens_BxT)[chosen], lengths_B[chosen]
    assert lengths_B[:3].tolist() == [T, T, T]
    masked_BxT = np.random.default_rng(0).random((6, T)) < 0.3
    masked_BxT &= (np.arange(T) < lengths_B[:, None]) & (np.arange(6) > 2)[:, None]
    return in_dtype(language, np.float64), tokens_BxT, lengths_B, masked_BxT


def sentence_probs(language: Pcfg, leaves: list[np.ndarray]) -> np.ndarray:
    """Return P of R sentences by Baker's recursion over all spans; leaves[t] has 1 or R rows."""
    N = language.num_symbols
    rules_PxN = language.rules_NxNxN.reshape(N, N * N).T
    T, cells = len(leaves), {}
    for t, leaf_RxN in enumerate(leaves):
        cells[t, t + 1] = leaf_RxN
    for width in range(2, T + 1):
        for start in range(T - width + 1):
            end, splits = start + width, range(start + 1, start + width)
            left, right = [cells[start, k] for k in splits], [cells[k, end] for k in splits]
            R = max(map(len, left + right))
            left, right = (
                np.stack([np.broadcast_to(x, (R, N)) for x in side], axis=1)
                for side in (left, right)
            )
            pairs_RxNxN = left.swapaxes(1, 2) @ right
            cells[start, end] = pairs_RxNxN.reshape(R, N * N) @ rules_PxN
    return cells[0, T] @ language.start_N


@cache
def expected(name: str) -> dict[tuple[int, int], np.ndarray]:
    """Return p(x_t = v | the unmasked others) from P of the sentence with each word v at t."""
    language, tokens_BxT, lengths_B, masked_BxT = paper(name)
    words_VxN, any_word_1xN = language.emissions_NxV.T, language.emissions_NxV.sum(axis=1)[None]
    found = {}
    for b, t in PAPER[name][2]:
        leaves = [words_VxN[v : v + 1] for v in tokens_BxT[b, : lengths_B[b]]]
        leaves = [any_word_1xN if masked_BxT[b, s] else x for s, x in enumerate(leaves)]
        leaves[t] = words_VxN
        probs_V = sentence_probs(language, leaves)
        found[b, t] = probs_V / probs_V.sum()
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("16_words", np.float64),
        ("32_words", np.float32),
        *in_full(("16_words", np.float32), ("32_words", np.float64)),
    ],
)
@pytest.mark.slow
def test_conditionals_at_the_shape_of_the_paper(name, dtype):
    language, tokens_BxT, lengths_B, masked_BxT = paper(name)
    inputs_BxT = np.where(masked_BxT, 201, tokens_BxT)
    single = in_dtype(language, dtype)
    logp_BxTxV = single.conditional_log_probs(inputs_BxT, lengths_B, masked_BxT)
    assert logp_BxTxV.dtype == dtype
    p_BxTxV, errors = np.exp(np.asarray(logp_BxTxV, np.float64)), []
    for (b, t), expected_V in expected(name).items():
        assert t < lengths_B[b]
        assert expected_V.max() > 0.02
        errors.append(np.abs(p_BxTxV[b, t] - expected_V).max())
    assert max(errors) < {np.float64: 1e-12, np.float32: 1e-5}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_conditionals_of_sampled_sentences(seed):
    """At the concentrations of the paper's shape; far smaller ones need float64 (see docs)."""
    grammar = random_levelled_grammar(
        seed,
        level_sizes=(9, 10, 10, 10, 10),
        num_words=200,
        emission_probability=0.1,
        rule_concentration=0.01,
        emission_concentration=0.05,
    )
    language = make_pcfg(grammar, length=16, min_length=2, tasks=[()])
    with jax.enable_x64(False):
        sentences = language.sample(jax.random.key(seed), 200)
    tokens_BxT, lengths_B = np.asarray(sentences.tokens_BxT), np.asarray(sentences.lengths_B)
    words_BxT = np.arange(16) < lengths_B[:, None]
    for share in (0.0, 0.4):
        masked_BxT = words_BxT & (np.random.default_rng(0).random(words_BxT.shape) < share)
        inputs_BxT = np.where(masked_BxT, 201, tokens_BxT)
        double, single = (
            np.exp(
                np.asarray(
                    in_dtype(language, dtype).conditional_log_probs(
                        inputs_BxT, lengths_B, masked_BxT
                    ),
                    np.float64,
                )
            )
            for dtype in (np.float64, np.float32)
        )
        np.testing.assert_allclose(single, double, rtol=0, atol=1e-4)
