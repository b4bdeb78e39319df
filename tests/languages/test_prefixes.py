"""Next symbols and posteriors given the first words, against sums over all whole sentences."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from jaxflat.languages.balanced_tree import random_balanced_tree
from jaxflat.languages.dyck import random_dyck
from jaxflat.languages.hmm import random_hmm
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import prefix_posteriors
from tests.support.enumeration import (
    MadeOnDemand,
    PrefixLaw,
    prefix_law,
    shortest,
    small_hmm,
    small_tree,
)

LANGUAGES = MadeOnDemand(
    {
        "hmm": lambda: small_hmm(0, num_states=3, num_words=3, length=4, min_length=1),
        "late_hmm": lambda: small_hmm(1, num_states=2, num_words=2, length=5, min_length=3),
        "hmm_of_one_length": lambda: small_hmm(
            2, num_states=4, num_words=3, length=3, min_length=3
        ),
        "tree_of_2": lambda: small_tree(3, num_states=4, num_words=3, depth=1),
        "tree_of_4": lambda: small_tree(4, num_states=3, num_words=3, depth=2),
        "tree_of_8": lambda: small_tree(5, num_states=2, num_words=2, depth=3),
        "dyck": lambda: random_dyck(0, length=6, min_length=2, tasks=(1, 2, 3, 4, 5, 6)),
        "dyck_of_one_length": lambda: random_dyck(0, length=6, min_length=6, tasks=(4,)),
    }
)
SLOW = ("tree_of_8",)
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LANGUAGES]


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


def sentences_of(name: str) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the words of all sentences, and their numbers."""
    sentences = all_sentences(name)
    lengths = sentences.lengths_B.tolist()
    rows = zip(sentences.tokens_BxT.tolist(), lengths, strict=True)
    return [tuple(tokens[:length]) for tokens, length in rows], lengths


@cache
def next_log_probs(name: str) -> np.ndarray:
    sentences = all_sentences(name)
    logp = LANGUAGES[name].next_log_probs(sentences.tokens_BxT, sentences.lengths_B)
    return np.asarray(logp)


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_prefix_posteriors_equal_enumeration(name):
    """From the last word of the place to the end of the sentence; zeros elsewhere."""
    sentences, tasks = all_sentences(name), LANGUAGES[name].tasks
    together = prefix_posteriors(tasks, sentences)
    (name_of_last, last) = list(tasks.items())[-1]
    alone_BxTxC = last.prefix_posterior(sentences)
    np.testing.assert_allclose(alone_BxTxC, together[name_of_last], rtol=1e-12)
    for key, task in tasks.items():
        expected_BxTxC = np.zeros((*sentences.tokens_BxT.shape, task.num_classes))
        for b, (words, length) in enumerate(zip(*sentences_of(name), strict=True)):
            for t in range(task.span[1] - 1, length):
                expected_BxTxC[b, t] = law(name).symbols[task.place][words[: t + 1]]
        np.testing.assert_allclose(together[key], expected_BxTxC, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
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
    probs_BxTxK = np.asarray(language.state_beliefs(sentences.tokens_BxT, sentences.lengths_B))
    expected_BxTxK = np.zeros_like(probs_BxTxK)
    for t, probs_BxTxC in enumerate(prefix_posteriors(language.tasks, sentences).values()):
        expected_BxTxK[:, t, : probs_BxTxC.shape[2]] = probs_BxTxC[:, t]
    np.testing.assert_allclose(probs_BxTxK, expected_BxTxK, atol=1e-12)
    inside_BxT = np.arange(language.max_length) < sentences.lengths_B[:, None]
    np.testing.assert_allclose(expected_BxTxK.sum(axis=2), inside_BxT, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "words"),
    [("late_hmm", (0,)), ("late_hmm", (2, 2, 2, 0)), ("dyck", (1, 1, 1, 1, 0, 0)), ("dyck", (1,))],
)
@pytest.mark.slow
def test_impossible_sentences_have_finite_logs(name, words):
    """Sentences that are too short, have a word without emission, or begin no zero sum."""
    language = LANGUAGES[name]
    if name == "late_hmm":
        emissions_KxV = np.pad(language.emissions_KxV, ((0, 0), (0, 1)))
        language = dataclasses.replace(language, emissions_KxV=emissions_KxV)
    tokens_1xT = np.array([[*words, *[0] * (language.max_length - len(words))]], np.int32)
    arguments = tokens_1xT, np.array([len(words)], np.int32)
    assert np.isfinite(language.next_log_probs(*arguments)).all()
    assert np.isfinite(language.prefix_posteriors(Sentences(*arguments, None), ((1,),))[0]).all()
    logp = language.log_prob(*arguments)[0]
    assert np.isfinite(logp)
    assert logp < -700


LARGE = MadeOnDemand(
    {
        "balanced_tree": lambda: random_balanced_tree(
            0,
            depth=5,
            num_states=10,
            num_words=200,
            rule_concentration=0.1,
            emission_concentration=0.02,
            tasks=((0, 4), (8, 16)),
        ),
        "dyck": lambda: random_dyck(0, length=32, min_length=4, tasks=(3, 20)),
        "hmm": lambda: random_hmm(
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
)


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
    if name != "dyck":  # its sentences are likelier
        assert logp_B.min() < np.log(np.finfo(np.float32).tiny)
    assert np.isfinite(logp_BxSxU).all()
    np.testing.assert_allclose(
        np.exp(logp_BxSxU), np.exp(exact.next_log_probs(*words)), rtol=0, atol=1e-5
    )
    for key, expected_BxTxC in prefix_posteriors(exact.tasks, sentences).items():
        assert probs[key].dtype == np.float32
        np.testing.assert_allclose(probs[key], expected_BxTxC, rtol=0, atol=1e-5)
