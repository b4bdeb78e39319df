"""Next symbols and posteriors given the first words, against sums over all whole sentences."""

from functools import cache

import jax
import numpy as np
import pytest

from jaxflat.languages.hmm import random_hmm
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import prefix_posteriors
from tests.support.enumeration import PrefixLaw, prefix_law, shortest, small_hmm

LANGUAGES = {
    "hmm": small_hmm(0, num_states=3, num_words=3, length=4, min_length=1),
    "late_hmm": small_hmm(1, num_states=2, num_words=2, length=5, min_length=3),
    "hmm_of_one_length": small_hmm(2, num_states=4, num_words=3, length=3, min_length=3),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@cache
def law(name: str) -> PrefixLaw:
    return prefix_law(LANGUAGES[name])


@cache
def all_sentences(name: str) -> Sentences:
    """Return every sentence of positive probability, with words past the end that do not count."""
    T, words = LANGUAGES[name].max_length, [w for w, p in law(name).sentences.items() if p > 0]
    tokens_BxT = np.array([w + (0,) * (T - len(w)) for w in words], np.int32)
    return Sentences(tokens_BxT, np.array([len(w) for w in words], np.int32), latents=None)


@cache
def next_log_probs(name: str) -> np.ndarray:
    sentences = all_sentences(name)
    logp = LANGUAGES[name].next_log_probs(sentences.tokens_BxT, sentences.lengths_B)
    return np.asarray(logp)


@pytest.mark.parametrize("name", LANGUAGES)
def test_next_symbols_equal_enumeration(name):
    language, logp_BxSxU = LANGUAGES[name], next_log_probs(name)
    sentences, U = all_sentences(name), language.num_words + 1
    assert logp_BxSxU.dtype == np.float64
    assert logp_BxSxU.shape == (len(sentences.lengths_B), language.max_length + 1, U)
    for words, length, logp_SxU in zip(*sentences_of(name), logp_BxSxU, strict=True):
        expected_SxU = [law(name).next_symbols[words[:s]] for s in range(length + 1)]
        np.testing.assert_allclose(np.exp(logp_SxU[: length + 1]), expected_SxU, atol=1e-10)
        np.testing.assert_allclose(np.exp(logp_SxU[length + 1 :]), 1 / U, rtol=1e-12)
    assert (logp_BxSxU[sentences.lengths_B == language.max_length, -1, -1] == 0).all()
    assert np.isfinite(logp_BxSxU).all()


def sentences_of(name: str) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the words of all sentences, and their numbers."""
    sentences = all_sentences(name)
    lengths = sentences.lengths_B.tolist()
    rows = zip(sentences.tokens_BxT.tolist(), lengths, strict=True)
    return [tuple(tokens[:length]) for tokens, length in rows], lengths


@pytest.mark.parametrize("name", LANGUAGES)
def test_log_probs_of_sentences_equal_enumeration_and_the_chain_rule(name):
    sentences = all_sentences(name)
    logp_B = np.asarray(LANGUAGES[name].log_prob(sentences.tokens_BxT, sentences.lengths_B))
    assert logp_B.dtype == np.float64
    assert abs(np.exp(logp_B).sum() - 1) < 1e-10
    for words, length, logp, logp_SxU in zip(
        *sentences_of(name), logp_B, next_log_probs(name), strict=True
    ):
        assert abs(np.exp(logp) - law(name).sentences[words]) < 1e-10
        symbols = [*words, LANGUAGES[name].num_words]
        assert abs(logp_SxU[range(length + 1), symbols].sum() - logp) < 1e-9


@pytest.mark.parametrize("name", LANGUAGES)
def test_prefix_posteriors_equal_enumeration(name):
    """From the last word of the place to the end of the sentence; zeros elsewhere."""
    sentences, tasks = all_sentences(name), LANGUAGES[name].tasks
    together = prefix_posteriors(tasks, sentences)
    for key, task in tasks.items():
        probs_BxTxC = np.asarray(together[key])
        alone_BxTxC = task.prefix_posterior(sentences)
        np.testing.assert_allclose(alone_BxTxC, probs_BxTxC, rtol=1e-12)
        expected_BxTxC = np.zeros((*sentences.tokens_BxT.shape, task.num_classes))
        for b, (words, length) in enumerate(zip(*sentences_of(name), strict=True)):
            for t in range(task.span[1] - 1, length):
                expected_BxTxC[b, t] = law(name).symbols[task.place][words[: t + 1]]
        np.testing.assert_allclose(probs_BxTxC, expected_BxTxC, atol=1e-10)


@pytest.mark.parametrize("name", LANGUAGES)
def test_later_words_and_the_end_change_nothing(name):
    """Prediction s knows x_0 .. x_s-1 and that the sentence has s words."""
    language = LANGUAGES[name]
    full = jax.tree.map(
        lambda x: x[all_sentences(name).lengths_B == language.max_length], all_sentences(name)
    )
    tokens_BxT = full.tokens_BxT
    before = np.asarray(language.next_log_probs(tokens_BxT, full.lengths_B))
    for s in range(language.max_length):
        order = np.random.default_rng(s).permutation(len(tokens_BxT))
        changed_BxT = np.where(np.arange(language.max_length) < s, tokens_BxT, tokens_BxT[order])
        lengths_B = np.maximum(shortest(language), np.full_like(full.lengths_B, s))
        after = np.asarray(language.next_log_probs(changed_BxT, lengths_B))
        np.testing.assert_allclose(after[:, : s + 1], before[:, : s + 1], rtol=1e-12)


@pytest.mark.parametrize("name", ["hmm", "late_hmm", "hmm_of_one_length"])
def test_beliefs_are_the_posteriors_of_the_present_state(name):
    language, sentences = LANGUAGES[name], all_sentences(name)
    probs_BxTxK = language.state_beliefs(sentences.tokens_BxT, sentences.lengths_B)
    of_places = [np.asarray(task.prefix_posterior(sentences)) for task in language.tasks.values()]
    expected_BxTxK = np.stack([probs[:, t] for t, probs in enumerate(of_places)], axis=1)
    np.testing.assert_allclose(probs_BxTxK, expected_BxTxK, atol=1e-12)
    assert (expected_BxTxK.sum(axis=2)[sentences.lengths_B < language.max_length, -1] == 0).all()


LARGE = {
    "hmm": random_hmm(
        0,
        num_states=100,
        num_words=200,
        length=31,
        min_length=8,
        transition_concentration=0.1,
        emission_concentration=0.02,
        tasks=(3, 20),
    ),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.slow
def test_float32_is_near_float64_at_the_papers_sizes(name):
    language = LARGE[name]
    with jax.enable_x64(False):
        sentences = language.sample(jax.random.key(0), 64)
        logp_BxSxU = language.next_log_probs(sentences.tokens_BxT, sentences.lengths_B)
        logp_B = np.asarray(language.log_prob(sentences.tokens_BxT, sentences.lengths_B))
        probs = prefix_posteriors(language.tasks, sentences)
    assert logp_BxSxU.dtype == logp_B.dtype == np.float32
    exact = jax.tree.map(lambda table: np.asarray(table, np.float64), language)
    words = sentences.tokens_BxT, sentences.lengths_B
    np.testing.assert_allclose(logp_B, exact.log_prob(*words), rtol=0, atol=1e-4)
    assert logp_B.min() < np.log(np.finfo(np.float32).tiny)
    assert np.isfinite(logp_BxSxU).all()
    np.testing.assert_allclose(
        np.exp(logp_BxSxU), np.exp(exact.next_log_probs(*words)), rtol=0, atol=1e-5
    )
    for key, expected_BxTxC in prefix_posteriors(exact.tasks, sentences).items():
        assert probs[key].dtype == np.float32
        np.testing.assert_allclose(probs[key], expected_BxTxC, rtol=0, atol=1e-5)
