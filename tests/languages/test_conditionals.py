"""The oracle against enumeration, and the properties that make it an oracle."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxflat.languages.grammars.pcfg import Pcfg
from tests.support.enumeration import (
    SMALL,
    derivations,
    ragged_batch,
    shortest,
    small_derivations,
    small_hmm,
    small_levelled,
    small_pcfg,
    small_tree,
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", SMALL)
def test_equals_enumeration(name):
    """Return six sentences of different lengths; the last three have masked words."""
    language, rng = SMALL[name], np.random.default_rng(0)
    tokens_BxT, lengths_B = ragged_batch(language, seed=len(name))
    inside_BxT = np.arange(language.max_length) < lengths_B[:, None]
    masked_BxT = inside_BxT & (rng.random(tokens_BxT.shape) < 0.4)
    masked_BxT[:3] = False
    assert masked_BxT.any()
    inputs_BxT = np.where(masked_BxT, language.num_words + 1, tokens_BxT)
    logp_BxTxV = language.conditional_log_probs(inputs_BxT, lengths_B, masked_BxT)
    unmasked_BxTxV = language.conditional_log_probs(tokens_BxT, lengths_B)
    assert logp_BxTxV.dtype == np.float64
    np.testing.assert_allclose(unmasked_BxTxV[:3], logp_BxTxV[:3], rtol=1e-12)
    for b, length in enumerate(lengths_B.tolist()):
        words, masked = tuple(tokens_BxT[b, :length]), set(np.flatnonzero(masked_BxT[b]))
        for t in range(length):
            expected_V = small_derivations(name, length).conditional(words, t, masked)
            np.testing.assert_allclose(np.exp(logp_BxTxV[b, t]), expected_V, rtol=1e-10)
    np.testing.assert_allclose(
        np.exp(np.asarray(logp_BxTxV)[~inside_BxT]), 1 / language.num_words, rtol=1e-12
    )


@pytest.mark.parametrize("name", SMALL)
def test_does_not_look_at_the_word_it_predicts(name):
    language = SMALL[name]
    tokens_BxT, lengths_B = ragged_batch(language, seed=1)
    before = np.asarray(language.conditional_log_probs(tokens_BxT, lengths_B))
    np.testing.assert_allclose(np.exp(before).sum(axis=2), 1, rtol=1e-12)
    for t in range(shortest(language)):
        changed_BxT = tokens_BxT.copy()
        changed_BxT[:, t] = (changed_BxT[:, t] + 1) % language.num_words
        after = np.asarray(language.conditional_log_probs(changed_BxT, lengths_B))
        np.testing.assert_allclose(after[:, t], before[:, t], rtol=1e-10)
        others = np.arange(language.max_length) != t
        assert np.abs(after - before)[:, others].max() > 1e-3


def _rare_words(grammar: Pcfg) -> Pcfg:
    return dataclasses.replace(grammar, emissions_NxV=1e-9 * grammar.emissions_NxV)


@pytest.mark.parametrize(
    "language",
    [
        small_hmm(7, num_states=5, num_words=50, length=60, min_length=50),
        small_tree(8, num_states=4, num_words=50, depth=6),
        _rare_words(small_pcfg(9, num_symbols=4, num_words=50, length=7, min_length=5)),
        _rare_words(small_levelled(9, (2, 3, 3, 3), num_words=50, length=8, min_length=5)),
    ],
    ids=["hmm", "balanced_tree", "pcfg", "levelled"],
)
@pytest.mark.slow
def test_float32_does_not_underflow(language):
    """These sentences have probabilities below the smallest float32."""
    tokens_BxT, lengths_B = ragged_batch(language, seed=2)
    exact = language.conditional_log_probs(tokens_BxT, lengths_B)
    single = jax.tree.map(
        lambda table: table.astype(np.float32) if table.dtype == np.float64 else table, language
    )
    logp_BxTxV = single.conditional_log_probs(tokens_BxT, lengths_B)
    assert logp_BxTxV.dtype == np.float32
    np.testing.assert_allclose(np.exp(logp_BxTxV), np.exp(exact), rtol=2e-4)


@pytest.mark.slow
def test_large_batches():
    """A sentence's conditionals do not depend on the number of sentences in the batch."""
    language = jax.tree.map(
        lambda table: table.astype(np.float32) if table.dtype == np.float64 else table,
        small_levelled(0, (3, 3, 4, 4), num_words=12, length=8),
    )
    with jax.enable_x64(False):
        sentences = language.sample(jax.random.key(0), 20_000)
        many = language.conditional_log_probs(sentences.tokens_BxT, sentences.lengths_B)
        for first in (0, 19_900):
            few = jax.tree.map(lambda x, first=first: x[first : first + 100], sentences)
            logp_BxTxV = language.conditional_log_probs(few.tokens_BxT, few.lengths_B)
            few_of_many = np.exp(many[first : first + 100])
            np.testing.assert_allclose(np.exp(logp_BxTxV), few_of_many, atol=1e-5)


def test_impossible_words_have_finite_logs():
    language = small_hmm(10, num_states=2, num_words=3, length=3, min_length=3)
    language.emissions_KxV[:] = [[0.5, 0.5, 0.0], [0.3, 0.7, 0.0]]
    logp_BxTxV = language.conditional_log_probs(
        np.array([[0, 1, 2]], np.int32), np.array([3], np.int32)
    )
    p_BxTxV = np.exp(logp_BxTxV)
    assert np.isfinite(logp_BxTxV).all()
    assert p_BxTxV[0, :, 2].max() < 1e-300
    # After an impossible neighbour all words are possible; at its own position it changes nothing.
    expected_V = derivations(language, 3).conditional((0, 1, 2), 2, set())
    np.testing.assert_allclose(p_BxTxV[0, 2], expected_V, atol=1e-12)


def test_a_language_is_an_argument_of_a_compiled_function():
    traces = []

    @jax.jit
    def first_log_prob(language, tokens_BxT, lengths_B):
        traces.append(1)
        return language.conditional_log_probs(tokens_BxT, lengths_B)[0, 0, 0]

    tokens_BxT, lengths_B = np.array([[0, 1, 2, 3]], np.int32), np.array([4], np.int32)
    one, other = (small_hmm(seed, 3, 5, length=4, min_length=4) for seed in (0, 1))
    assert first_log_prob(one, tokens_BxT, lengths_B) != first_log_prob(
        other, tokens_BxT, lengths_B
    )
    assert len(traces) == 1
