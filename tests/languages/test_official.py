"""The labels of the paper's code against labels by NLTK's chart parser."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from jaxflat.languages.grammars.grammar import Grammar, random_levelled_grammar
from jaxflat.languages.grammars.pcfg import Pcfg, make_pcfg
from jaxflat.languages.sentences import Sentences
from tests.support.counts import FULL
from tests.support.official_labels import official_labels

SEEDS, SENTENCES = (0, 1, 2) if FULL else (1,), 167  # 501 in all
PLACES = [(), (0, 4), (0, 2)]


def name_of(place: tuple[int, ...]) -> str:
    return "_".join(["span", *map(str, place)]) if place else "root"


@cache
def sampled(seed: int) -> tuple[Grammar, Pcfg, Sentences]:
    """Probabilities are so unequal that derivations differ by dozens of orders of magnitude."""
    grammar = random_levelled_grammar(
        seed,
        level_sizes=(4, 6, 6, 6, 6),
        num_words=40,
        emission_probability=0.1,
        rule_concentration=0.002,
        emission_concentration=0.002,
    )
    language = make_pcfg(grammar, length=16, min_length=2, tasks=PLACES)
    return grammar, language, language.sample(jax.random.key(seed), SENTENCES)


@cache
def by_nltk(
    grammar: Grammar, words: tuple[tuple[int, ...], ...], place: tuple[int, ...]
) -> np.ndarray:
    return official_labels(grammar, words, place or "root").labels_B


def assert_equal(
    grammar: Grammar, language: Pcfg, sentences: Sentences, place: tuple[int, ...], dtype
) -> None:
    """Return the label of every sentence and whether it is valid."""
    tokens_BxT, lengths_B = np.asarray(sentences.tokens_BxT), np.asarray(sentences.lengths_B)
    words = [tokens_T[:n].tolist() for tokens_T, n in zip(tokens_BxT, lengths_B, strict=True)]
    expected_B = by_nltk(grammar, tuple(map(tuple, words)), place)
    tables = {name: getattr(grammar, name) for name in ("start_N", "rules_NxNxN", "emissions_NxV")}
    with jax.enable_x64(dtype is np.float64):
        if dtype is np.float64:
            language = dataclasses.replace(language, **tables)
        task = language.tasks[name_of(place)]
        plain = Sentences(tokens_BxT, lengths_B, latents=None)  # labels need no latents
        labels_B, valid_B = map(np.asarray, task.labels(plain, "official"))
    assert labels_B.dtype == np.int32
    np.testing.assert_array_equal(np.where(valid_B, labels_B, -1), expected_B)
    long_enough_B = (lengths_B > 4) & (lengths_B < 32)
    assert not valid_B[~long_enough_B].any()
    assert valid_B[long_enough_B].mean() > 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", PLACES[1:], ids=name_of)
@pytest.mark.slow
def test_spans_of_sampled_sentences(place, dtype):
    for seed in SEEDS:
        assert_equal(*sampled(seed), place, dtype)
    lengths_B = np.concatenate([sampled(seed)[2].lengths_B for seed in SEEDS])
    assert {2, 5, 16} <= set(lengths_B.tolist())


@pytest.mark.slow
def test_roots_of_some_sentences():
    for seed in SEEDS:
        grammar, language, sentences = sampled(seed)
        some = jax.tree.map(lambda leaf: np.asarray(leaf)[:10], sentences)
        assert_equal(grammar, language, some, (), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_roots_of_sampled_sentences(seed, dtype):
    assert_equal(*sampled(seed), (), dtype)


@pytest.mark.parametrize("place", [(), (0, 2)], ids=name_of)
@pytest.mark.slow
def test_sentences_of_5_to_31_words_have_labels(place):
    """Six levels yield sentences of 32 words, which have no official label."""
    grammar = random_levelled_grammar(
        0,
        level_sizes=(2, 2, 2, 2, 2, 2),
        num_words=6,
        emission_probability=(0.3, 0.3, 0.0, 0.05),
        rule_concentration=1.0,
        emission_concentration=1.0,
    )
    language = make_pcfg(grammar, length=32, min_length=2, tasks=PLACES)
    sentences = language.sample(jax.random.key(0), 2000)
    lengths_B = np.asarray(sentences.lengths_B)
    chosen = [np.flatnonzero(lengths_B == n)[0] for n in (2, 3, 4, 10, 31, 32)]
    some = jax.tree.map(lambda leaf: np.asarray(leaf)[np.array(chosen)], sentences)
    assert_equal(grammar, language, some, place, np.float32)
