"""The figures of a language against enumeration, closed forms, and their own spread."""

import math
from collections import Counter
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.languages.balanced_tree import BalancedTree
from jaxflat.languages.dyck import random_dyck
from jaxflat.languages.hmm import Hmm
from jaxflat.runs.language_figures import measure_language
from tests.support.enumeration import SMALL, shortest, small_derivations


def entropy(p_V: np.ndarray) -> float:
    return -sum(p * math.log(p) for p in np.ravel(p_V) if p > 0)


def length_weights(name: str) -> dict[int, float]:
    """Return what multiplies the probabilities of the derivations of each length."""
    language = SMALL[name]
    lengths = range(shortest(language), language.max_length + 1)
    if isinstance(language, BalancedTree):
        return {language.max_length: 1.0}
    if isinstance(language, Hmm):  # a uniform length, then the chain
        return dict.fromkeys(lengths, 1 / len(lengths))
    words = range(language.num_words)
    totals = [
        sum(small_derivations(name, n).prob(x) for x in product(words, repeat=n)) for n in lengths
    ]
    return dict.fromkeys(lengths, 1 / sum(totals))


def enumerated(name: str, place: tuple[int, ...]) -> dict[str, float]:
    """Return the figures by summing over all sentences and all of their derivations."""
    V, conditional, bayes = SMALL[name].num_words, 0.0, 0.0
    unigram_V, label_K = np.zeros(V), Counter()
    for n, scale in length_weights(name).items():
        found = small_derivations(name, n)
        for words in product(range(V), repeat=n):
            weights_D = scale * found.weights_D(words)
            p = weights_D.sum()
            for t, word in enumerate(words):
                conditional += p / n * entropy(found.conditional(words, t, set()))
                unigram_V[word] += p / n
            joint_K = Counter()
            for weight, nodes in zip(weights_D, found.nodes, strict=True):
                if place in nodes:
                    joint_K[nodes[place]] += weight
            bayes += max(joint_K.values(), default=0.0)
            label_K.update(joint_K)
    exists = sum(label_K.values())
    return {
        "conditional": conditional,
        "unigram": entropy(unigram_V),
        "context": entropy(unigram_V) - conditional,
        "bayes": bayes / exists,
        "majority": max(label_K.values()) / exists,
        "exists": exists,
    }


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("hmm", (3,)),
        ("tree_of_4", (0, 2)),
        ("pcfg", (0, 2)),
        ("levelled", ()),
        ("levelled", (0, 2)),
    ],
)
@pytest.mark.slow
def test_every_figure_is_that_of_all_sentences(name, place):
    language = SMALL[name]
    task = next(task for task, one in language.tasks.items() if one.place == place)
    with jax.enable_x64(True):
        language = jax.tree.map(jnp.asarray, language)
        found = measure_language(language, "one", jax.random.key(0), num_sentences=8192)
    figures = {**found._asdict(), **found.tasks[task]._asdict()}
    expected = enumerated(name, place)
    for figure, exact in expected.items():
        estimate = figures[figure]
        assert estimate.num_samples == 8192
        assert estimate.over == "sentences"
        assert abs(float(estimate.mean) - exact) <= 4 * float(estimate.sem) + 1e-9, figure
        assert float(estimate.sem) < 0.01, figure


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_keys():
    language = jax.tree.map(jnp.asarray, SMALL["levelled"])
    with jax.enable_x64(True):
        found = [
            measure_language(language, "one", jax.random.key(seed), num_sentences=256)
            for seed in range(100)
        ]
    for estimates in zip(*([*one[:3], *one.tasks["span_0_2"]] for one in found), strict=True):
        spread = np.std([float(estimate.mean) for estimate in estimates], ddof=1)
        predicted = np.mean([float(estimate.sem) for estimate in estimates])
        assert 0.75 < spread / predicted < 1.33


@pytest.mark.slow
def test_a_noisy_copy_of_independent_fair_states():
    """Words copy fair coins, a tenth of them flipped: no context, and .9 against .5."""
    half_KxK = jnp.full((2, 2), 0.5)
    emissions_KxV = jnp.asarray([[0.9, 0.1], [0.1, 0.9]])
    hmm = Hmm(half_KxK[0], half_KxK, emissions_KxV, length=4, min_length=4, task_positions=(2,))
    found = measure_language(hmm, "one", jax.random.key(0), num_sentences=64)
    assert found.conditional.mean == pytest.approx(math.log(2), rel=1e-5)
    assert found.unigram.mean == pytest.approx(math.log(2), rel=1e-5)
    assert found.context.mean == pytest.approx(0, abs=1e-6)
    task = found.tasks["state_2"]
    assert task.bayes.mean == pytest.approx(0.9, rel=1e-5)
    assert abs(task.majority.mean - 0.5) < 4 * task.majority.sem
    assert (task.exists.mean, task.exists.sem) == (1, 0)


@pytest.mark.slow
def test_zero_sum_strings_with_one_word_and_with_two_words_hidden():
    """Of 12 words one hidden word is known; two are, unless they differ: in 6 of 11 cases."""
    language = random_dyck(0, length=12, min_length=12, tasks=(1,))
    one = measure_language(language, "one", jax.random.key(0), num_sentences=64)
    assert one.conditional.mean == pytest.approx(0, abs=1e-6)
    assert one.context.mean == pytest.approx(math.log(2), rel=1e-6)
    assert one.tasks["sum_1"].bayes.mean == 1
    two = measure_language(language, "share", jax.random.key(0), num_sentences=2048)
    assert abs(two.conditional.mean - 6 / 11 * math.log(2)) < 4 * two.conditional.sem
    assert two.conditional.sem < 0.01
