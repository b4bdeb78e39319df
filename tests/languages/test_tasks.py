"""Task labels and posteriors against enumeration, and against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.languages.balanced_tree import BalancedTree
from jaxflat.languages.dyck import random_dyck
from jaxflat.languages.hmm import Hmm
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.tasks import Task, posteriors
from tests.languages.test_sampling import RANDOM
from tests.support.enumeration import SMALL, Nodes, ragged_batch, shortest, small_derivations


def _true_nodes(language, latents, length: int) -> Nodes:
    """Return the hidden symbols of one sentence by place."""
    if isinstance(language, Hmm):
        return {(t + 1,): state for t, state in enumerate(latents[:length])}
    if isinstance(language, BalancedTree):
        states, nodes = iter(latents), {}
        for width in (length >> level for level in range(language.depth + 1)):
            nodes |= {(start, start + width): next(states) for start in range(0, length, width)}
        return nodes
    rows = zip(latents.symbol_BxM, latents.start_BxM, latents.width_BxM, strict=True)
    nodes = {(start, start + width): symbol for symbol, start, width in rows if width > 0}
    return nodes | {(): nodes[0, length]}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_posterior_equals_enumeration(name):
    language = SMALL[name]
    tasks = language.tasks
    names = list(tasks)
    with jax.enable_x64(True):
        words_BxT, lengths_B = ragged_batch(language, seed=0)
        sentences = Sentences(words_BxT, lengths_B, latents=None)  # posteriors need no latents
        together = posteriors(tasks, sentences)
        for key in (names[0], names[len(names) // 2], names[-1]):
            task = tasks[key]
            probs_BxC = np.asarray(task.posterior(sentences))
            np.testing.assert_allclose(together[key], probs_BxC, rtol=1e-12)
            assert probs_BxC.shape == (len(lengths_B), task.num_classes)
            long_enough = np.flatnonzero(lengths_B >= max(task.place, default=0))
            assert len(long_enough) > 0
            for b in long_enough:
                n = int(lengths_B[b])
                exact = small_derivations(name, n)
                if not any(task.place in nodes for nodes in exact.nodes):
                    continue  # no derivation has a constituent there
                expected_C = exact.posterior(tuple(words_BxT[b, :n]), task.place)
                np.testing.assert_allclose(probs_BxC[b], expected_C, rtol=1e-9)


@pytest.mark.parametrize("one_length", [False, True])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_every_sentence_has_the_places_of_every_derivation(name, one_length):
    language = SMALL[name]
    if one_length and not isinstance(language, BalancedTree):
        language = dataclasses.replace(language, min_length=language.max_length)
    lengths = range(shortest(language), language.max_length + 1)
    derivations = [nodes for n in lengths for nodes in small_derivations(name, n).nodes]
    places = {place for nodes in derivations for place in nodes}
    shared = {place for place in places if all(place in nodes for nodes in derivations)}
    known = {place for place in places if Task(language, place).labels_every_sentence()}
    one_shape = name == "levelled" and one_length  # its levels leave no other
    assert known < shared if one_shape else known == shared
    assert not any(Task(language, place).labels_every_sentence("official") for place in places)


@pytest.mark.slow
def test_every_sentence_has_the_sums_of_the_shortest_sentence():
    language = random_dyck(0, length=8, min_length=4, tasks=(1, 4, 5, 8))
    sentences = Sentences(jnp.zeros((3, 8), jnp.int32), jnp.array([4, 6, 8]), None)
    for task in language.tasks.values():
        _, valid_B = task.labels(sentences)
        assert task.labels_every_sentence() == valid_B.all()


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.slow
def test_latent_labels_are_the_hidden_symbols(name):
    """Labels are valid exactly if the sentence is long enough and has a symbol at the place."""
    language = RANDOM[name]
    sentences = language.sample(jax.random.key(1), 20_000)
    sentences = jax.tree.map(lambda leaf: np.asarray(leaf)[:500], sentences)
    nodes = []
    for b, length in enumerate(sentences.lengths_B):
        latents = jax.tree.map(lambda leaf, b=b: leaf[b], sentences.latents)
        nodes.append(_true_nodes(language, latents, length))
    some_invalid = False
    for task in language.tasks.values():
        labels_B, valid_B = map(np.asarray, task.labels(sentences))
        assert labels_B.dtype == np.int32
        np.testing.assert_array_equal(valid_B, [task.place in found for found in nodes])
        assert valid_B.any()
        for b in np.flatnonzero(valid_B):
            assert labels_B[b] == nodes[b][task.place]
        some_invalid |= not valid_B.all()
    assert some_invalid != isinstance(language, BalancedTree)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.slow
def test_posteriors_are_calibrated(name):
    """E p(true label) = E sum_c p(c)^2 where p is the label's conditional distribution."""
    language = RANDOM[name]
    sentences = language.sample(jax.random.key(2), 20_000)
    for task in language.tasks.values():
        labels_B, valid_B = map(np.asarray, task.labels(sentences))
        probs_BxC = np.asarray(task.posterior(sentences), np.float64)[valid_B]
        of_true_B = np.take_along_axis(probs_BxC, labels_B[valid_B][:, None], axis=1)[:, 0]
        gap_B = of_true_B - (probs_BxC**2).sum(axis=1)
        assert len(gap_B) > 100
        assert gap_B.std() > 0.05
        assert abs(gap_B.mean()) < 3 * gap_B.std(ddof=1) / np.sqrt(len(gap_B))


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.slow
def test_map_labels_are_the_most_probable(name):
    language = RANDOM[name]
    sentences = language.sample(jax.random.key(3), 20_000)
    for task in language.tasks.values():
        latent_B, valid_B = map(np.asarray, task.labels(sentences, "latent"))
        map_B, map_valid_B = map(np.asarray, task.labels(sentences, "map"))
        np.testing.assert_array_equal(map_valid_B, valid_B)
        np.testing.assert_array_equal(map_B, np.argmax(task.posterior(sentences), axis=1))
        # The Bayes accuracy is the frequency with which the most probable label is the true one.
        agree, best = (map_B == latent_B)[valid_B], task.posterior(sentences).max(axis=1)
        sem = agree.std(ddof=1) / np.sqrt(valid_B.sum())
        assert abs(agree.mean() - np.asarray(best)[valid_B].mean()) < 3 * sem


def test_unknown_labeling_names_the_choices():
    task = next(iter(RANDOM["hmm"].tasks.values()))
    sentences = RANDOM["hmm"].sample(jax.random.key(4), 20_000)
    with pytest.raises(ValueError, match="labeling must be one of latent, map; got 'oracle'"):
        task.labels(sentences, "oracle")
