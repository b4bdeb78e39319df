"""Probabilities of sentences, next words and symbols given prefixes, against all derivations."""

import dataclasses
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxflat.languages.grammars.pcfg import Pcfg, pcfg_from_file
from tests.languages.test_levelled import by_hand, in_dtype, of_hand
from tests.support.enumeration import (
    SMALL,
    derivations,
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


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.slow
def test_log_probs_of_all_sentences(name):
    language, truth = exact(name)
    found_B = language.log_prob(truth.tokens_BxT, truth.lengths_B)
    assert found_B.dtype == np.float64
    np.testing.assert_allclose(found_B, np.log(truth.probs_B), rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.exp(found_B).sum(), 1, rtol=1e-10)
