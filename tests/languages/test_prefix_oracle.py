"""Probabilities of sentences, next words and symbols given prefixes, against all derivations."""

import dataclasses
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.languages.grammars.pcfg import Pcfg, pcfg_from_file
from jaxflat.languages.sentences import Sentences
from tests.languages.test_levelled import by_hand, in_dtype, of_hand, paper
from tests.support.enumeration import (
    SMALL,
    derivations,
    ragged_batch,
    small_levelled,
    small_pcfg,
)

RULES = """
S A 0.25
S A B 0.75
A A A 0.25
A a 0.5
A b 0.25
B B A 0.25
B b 0.75
"""

ALL_PLACES = ((), *((start, end) for end in range(1, 6) for start in range(end)))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _from_file() -> Pcfg:
    """Return a recursive grammar whose probabilities are exact in float32."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "grammar.txt"
        path.write_text(RULES.strip())
        language = pcfg_from_file(0, path=str(path), length=5, min_length=2, tasks=ALL_PLACES)
    return in_dtype(language, np.float64)


def _bounded(language: Pcfg, min_length: int) -> Pcfg:
    return dataclasses.replace(language, min_length=min_length)


LANGUAGES = {
    "pcfg": lambda: SMALL["pcfg"],
    "longer_pcfg": lambda: SMALL["longer_pcfg"],
    "four_words": lambda: _bounded(small_pcfg(0, num_symbols=2, num_words=2, length=4), 4),
    "one_word": lambda: small_pcfg(1, num_symbols=3, num_words=4, length=1),
    "levelled": lambda: SMALL["levelled"],
    "cut_levels": lambda: SMALL["cut_levels"],
    "long_and_cut": lambda: _bounded(SMALL["cut_levels"], 4),
    "two_levels": lambda: small_levelled(0, (2, 3), num_words=3, length=2),
    "two_levels_and_room": lambda: small_levelled(1, (3, 2), num_words=3, length=4),
    "words_at_the_top": lambda: of_hand(by_hand(5, (2, 3, 2), roots=[0, 1]), 4),
    "from_file": _from_file,
    "one_root_of_two": lambda: of_hand(by_hand(6, (3, 2, 2, 2), roots=[1], zeros=0.5), 4),
    "roots_below_the_top": lambda: of_hand(by_hand(8, (2, 2), roots=[1, 2]), 3),
}


class Exact(NamedTuple):
    """All possible sentences, their probabilities, and those of each node and sentence."""

    tokens_BxT: np.ndarray
    lengths_B: np.ndarray
    probs_B: np.ndarray
    joint: dict[tuple[int, ...], np.ndarray]  # by place, BxN


@cache
def exact(name: str) -> tuple[Pcfg, Exact]:
    language = LANGUAGES[name]()
    return language, enumerated(language)


def enumerated(language: Pcfg) -> Exact:
    T, V, N = language.max_length, language.num_words, language.num_symbols
    tokens, lengths, probs, nodes = [], [], [], []
    for length in range(language.min_length, T + 1):
        try:
            found = derivations(language, length)
        except ValueError:  # there are none
            continue
        places = {place for tree in found.nodes for place in tree}
        has = {
            place: np.array([[tree.get(place) == A for A in range(N)] for tree in found.nodes])
            for place in places
        }
        for words in product(range(V), repeat=length):
            weights_D = found.weights_D(words)
            if weights_D.sum() > 0:
                tokens.append([*words, *[V] * (T - length)])
                lengths.append(length)
                probs.append(weights_D.sum())
                nodes.append({place: weights_D @ has_DxN for place, has_DxN in has.items()})
    total = sum(probs)
    joint = {
        place: np.stack([n.get(place, np.zeros(N)) for n in nodes]) / total
        for place in set().union(*nodes)
    }
    arrays = np.array(tokens, np.int32), np.array(lengths, np.int32), np.array(probs) / total
    return Exact(*arrays, joint)


def same_prefix(truth: Exact, b: int, num_words: int) -> np.ndarray:
    """Return which sentences begin with the first num_words of sentence b."""
    same_B = (truth.tokens_BxT[:, :num_words] == truth.tokens_BxT[b, :num_words]).all(axis=1)
    return same_B & (truth.lengths_B >= num_words)


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.slow
def test_log_probs_of_all_sentences(name):
    language, truth = exact(name)
    found_B = language.log_prob(truth.tokens_BxT, truth.lengths_B)
    assert found_B.dtype == np.float64
    np.testing.assert_allclose(found_B, np.log(truth.probs_B), rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.exp(found_B).sum(), 1, rtol=1e-10)


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.slow
def test_next_words_after_all_prefixes(name):
    language, truth = exact(name)
    V, T = language.num_words, language.max_length
    logp_BxSxU = np.asarray(language.next_log_probs(truth.tokens_BxT, truth.lengths_B))
    assert logp_BxSxU.dtype == np.float64
    assert logp_BxSxU.shape == (len(truth.probs_B), T + 1, V + 1)
    ended_BxT1 = np.pad(truth.tokens_BxT, ((0, 0), (0, 1)), constant_values=V)
    for b, length in enumerate(truth.lengths_B.tolist()):
        for s in range(length + 1):
            weights_B = truth.probs_B * same_prefix(truth, b, s)
            expected_U = np.bincount(ended_BxT1[:, s], weights_B, V + 1) / weights_B.sum()
            found_U = np.exp(logp_BxSxU[b, s])
            np.testing.assert_allclose(found_U, expected_U, rtol=0, atol=1e-10)
        np.testing.assert_allclose(np.exp(logp_BxSxU[b, length + 1 :]), 1 / (V + 1), rtol=1e-12)
    known_BxS = np.arange(T + 1) <= truth.lengths_B[:, None]
    chosen_BxS = np.take_along_axis(logp_BxSxU, ended_BxT1[..., None], axis=2)[..., 0]
    chain_B = np.where(known_BxS, chosen_BxS, 0).sum(axis=1)
    log_prob_B = language.log_prob(truth.tokens_BxT, truth.lengths_B)
    np.testing.assert_allclose(chain_B, log_prob_B, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.slow
def test_symbols_above_places_given_all_prefixes(name):
    language, truth = exact(name)
    places = language.task_places
    sentences = Sentences(*map(jnp.asarray, (truth.tokens_BxT, truth.lengths_B)), latents=None)
    found = language.prefix_posteriors(sentences, places)
    assert len(found) == len(places)
    assert truth.joint.keys() <= set(places)
    some = 0
    for place, found_BxTxN in zip(places, found, strict=True):
        assert found_BxTxN.dtype == np.float64
        expected_BxTxN = np.zeros(found_BxTxN.shape)
        joint_BxN = truth.joint.get(place, np.zeros((len(truth.probs_B), language.num_symbols)))
        for b, length in enumerate(truth.lengths_B.tolist()):
            for t in range(place[1] - 1 if place else 0, length):
                same_B = same_prefix(truth, b, t + 1)
                expected_BxTxN[b, t] = same_B @ joint_BxN / (same_B @ truth.probs_B)
        np.testing.assert_allclose(found_BxTxN, expected_BxTxN, rtol=0, atol=1e-10)
        some += (expected_BxTxN > 0.01).sum()
    assert some > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longer_pcfg", "cut_levels"])
def test_columns_of_pads_change_nothing(name):
    """Tokens of three columns, where sentences may have five words."""
    language, truth = exact(name)
    short_B = truth.lengths_B <= 3
    tokens_BxT, lengths_B = truth.tokens_BxT[short_B], truth.lengths_B[short_B]
    wide_BxSxU = language.next_log_probs(tokens_BxT, lengths_B)
    narrow_BxSxU = language.next_log_probs(tokens_BxT[:, :3], lengths_B)
    np.testing.assert_allclose(narrow_BxSxU, wide_BxSxU[:, :4], rtol=0, atol=1e-12)
    wide_B = language.log_prob(tokens_BxT, lengths_B)
    narrow_B = language.log_prob(tokens_BxT[:, :3], lengths_B)
    np.testing.assert_allclose(narrow_B, wide_B, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_impossible_words_and_lengths():
    language, V = small_levelled(11, (2, 2, 3), num_words=3, length=4, min_length=3), 3
    language.emissions_NxV[:, 1] += language.emissions_NxV[:, 2]
    language.emissions_NxV[:, 2] = 0
    tokens_BxT = np.array([[0, 1, 2, V], [0, 1, V, V], [0, 1, 1, 0]], np.int32)
    lengths_B = np.array([3, 2, 4], np.int32)
    assert np.isneginf(language.log_prob(tokens_BxT, lengths_B)).tolist() == [True, True, False]
    p_BxSxU = np.exp(language.next_log_probs(tokens_BxT, lengths_B))
    np.testing.assert_allclose(p_BxSxU.sum(axis=2), 1, rtol=1e-12)
    tiny = np.finfo(np.float64).tiny
    np.testing.assert_allclose(p_BxSxU[:, :3, 2], tiny)
    np.testing.assert_allclose(p_BxSxU[:, :2, V], tiny)  # two words are too few
    np.testing.assert_allclose(p_BxSxU[2, 4], [tiny, tiny, tiny, 1])  # and five too many
    sentences = Sentences(*map(jnp.asarray, (tokens_BxT, lengths_B)), latents=None)
    for found_BxTxN in language.prefix_posteriors(sentences, ((), (0, 2), (2, 3))):
        assert np.isfinite(found_BxTxN).all()
        assert not np.asarray(found_BxTxN[0, 2:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pcfg", "levelled"])
def test_float32_holds_words_and_lengths_of_tiny_probability(name):
    """Each word has a probability of 1e-9, and yields of 5 to 8 words less than any float32."""
    language = {
        "pcfg": lambda: small_pcfg(9, num_symbols=4, num_words=50, length=7, min_length=5),
        "levelled": lambda: small_levelled(9, (2, 3, 3, 3), 50, length=8, min_length=5),
    }[name]()
    language = dataclasses.replace(language, emissions_NxV=1e-9 * language.emissions_NxV)
    tokens_BxT, lengths_B = ragged_batch(language, seed=2)
    single = in_dtype(language, np.float32)
    exact_BxSxU = np.exp(language.next_log_probs(tokens_BxT, lengths_B))
    found_BxSxU = np.exp(single.next_log_probs(tokens_BxT, lengths_B))
    assert found_BxSxU.dtype == np.float32
    np.testing.assert_allclose(found_BxSxU, exact_BxSxU, rtol=2e-4, atol=1e-30)
    exact_B = language.log_prob(tokens_BxT, lengths_B)
    np.testing.assert_allclose(single.log_prob(tokens_BxT, lengths_B), exact_B, atol=1e-4)


@pytest.mark.slow
def test_float32_at_the_shape_of_the_paper():
    """Sentences of up to 32 words, among them some of probability e^-100."""
    language, tokens_BxT, lengths_B, _ = paper("32_words")
    single = in_dtype(language, np.float32)
    exact_BxSxU, found_BxSxU = (
        np.asarray(x.next_log_probs(tokens_BxT, lengths_B)) for x in (language, single)
    )
    exact_B, found_B = (np.asarray(x.log_prob(tokens_BxT, lengths_B)) for x in (language, single))
    assert exact_B.min() < -100
    np.testing.assert_allclose(found_B, exact_B, rtol=0, atol=1e-3)
    np.testing.assert_allclose(np.exp(found_BxSxU), np.exp(exact_BxSxU), rtol=0, atol=1e-4)
    ended_BxS = np.pad(tokens_BxT, ((0, 0), (0, 1)), constant_values=language.num_words)
    known_BxS = np.arange(33) <= lengths_B[:, None]
    for logp_BxSxU, log_prob_B, atol in (
        (exact_BxSxU, exact_B, 1e-9),
        (found_BxSxU, found_B, 1e-3),
    ):
        chosen_BxS = np.take_along_axis(logp_BxSxU, ended_BxS[..., None], axis=2)[..., 0]
        chain_B = np.where(known_BxS, chosen_BxS, 0).sum(axis=1)
        np.testing.assert_allclose(chain_B, log_prob_B, rtol=0, atol=atol)
    sentences = Sentences(*map(jnp.asarray, (tokens_BxT, lengths_B)), latents=None)
    places = ((), (0, 8), (3, 5))
    for exact_BxTxN, found_BxTxN in zip(
        *(x.prefix_posteriors(sentences, places) for x in (language, single)), strict=True
    ):
        np.testing.assert_allclose(found_BxTxN, exact_BxTxN, rtol=0, atol=1e-4)
        assert np.asarray(exact_BxTxN).max() > 0.1


@pytest.mark.slow
def test_large_batches():
    """A sentence's predictions do not depend on the number of sentences in the batch."""
    language = in_dtype(small_levelled(0, (3, 3, 4, 4), num_words=12, length=8), np.float32)
    with jax.enable_x64(False):
        sentences = language.sample(jax.random.key(0), 20_000)
        many = language.next_log_probs(sentences.tokens_BxT, sentences.lengths_B)
        for first in (0, 19_900):
            few = jax.tree.map(lambda x, first=first: x[first : first + 100], sentences)
            logp_BxSxU = language.next_log_probs(few.tokens_BxT, few.lengths_B)
            few_of_many = np.exp(many[first : first + 100])
            np.testing.assert_allclose(np.exp(logp_BxSxU), few_of_many, atol=1e-5)
