"""A text as a language: sampling, questions without exact answers, and errors over documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from scipy.stats import chisquare

from jaxflat.languages import batches
from jaxflat.languages.sentences import Sentences
from jaxflat.languages.windows import TextWindows
from jaxflat.runs.measure_loss import NUM_PARTS, document_estimates, held_out_set

make_questions = jax.jit(batches.make_questions, static_argnums=(3, 4))
sampled_batch = jax.jit(batches.sampled_batch, static_argnums=(2, 3, 4))

V, T, N = 9, 6, 20


@pytest.fixture(scope="module")
def text() -> TextWindows:
    random = np.random.default_rng(0)
    owners = np.sort(random.integers(0, 7, 12 * T)).reshape(12, T)
    words = (random.integers(0, V, shape) for shape in ((N, T), (12, T)))
    return TextWindows(*(jnp.asarray(x, jnp.int32) for x in (*words, owners)), num_words=V)


def test_a_batch_is_a_function_of_its_key_and_a_window_of_its_place(text):
    key = jax.random.key(0)
    batch = np.asarray(text.sample(key, 8).tokens_BxT)
    np.testing.assert_array_equal(batch, text.sample(key, 8).tokens_BxT)
    np.testing.assert_array_equal(batch[:5], text.sample(key, 5).tokens_BxT)
    assert (batch != np.asarray(text.sample(jax.random.key(1), 8).tokens_BxT)).any()


def test_training_windows_are_equally_likely_and_nothing_else_is_sampled(text):
    found = np.asarray(text.sample(jax.random.key(2), 4000).tokens_BxT)
    same_BxN = (found[:, None] == np.asarray(text.training_NxT)).all(2)
    assert (same_BxN.sum(1) == 1).all()
    assert chisquare(same_BxN.sum(0)).pvalue > 0.001


@pytest.mark.parametrize(("masking", "positions"), [("one", 0), ("one", 2), ("share", 0)])
def test_questions_ask_for_the_words_themselves_without_exact_answers(text, masking, positions):
    sentences = Sentences(text.held_out_HxT, jnp.full(12, T, jnp.int32), None)
    asked = make_questions(text, jax.random.key(0), sentences, masking, positions)
    assert asked.log_probs_SxRxMxV is None
    true = np.take_along_axis(np.asarray(text.held_out_HxT)[:, None], asked.positions_SxRxM, axis=2)
    np.testing.assert_array_equal(asked.words_SxRxM, true)
    batch = sampled_batch(text, jax.random.key(1), 8, "sampled", masking)
    assert ((batch.inputs_BxT == V + 1).sum(1) >= 1).all()


@pytest.mark.parametrize(("most", "batch_size"), [(12, 4), (100, 8), (5, 8)])
def test_held_out_words_count_once_for_their_document(text, most, batch_size):
    """Padding of the last batch has weight 0; a limit takes evenly spaced windows."""
    settings = FrozenConfigDict(
        {"num_sentences": most, "batch_size": batch_size, "num_positions": 0}
    )
    asked, documents_SxRxM, number = held_out_set(text, jax.random.key(0), "one", settings)
    assert len(asked.inputs_SxRxT) % batch_size == 0
    rows = np.arange(min(most, 12)) * 12 // min(most, 12)
    owners = np.asarray(text.documents_HxT)[rows]
    expected = np.unique(owners, return_counts=True)[1] / T
    assert number == len(expected)
    weights_D = np.bincount(np.ravel(documents_SxRxM), np.ravel(asked.weights_SxRxM))
    np.testing.assert_allclose(weights_D, expected, rtol=1e-6)


def test_the_error_over_documents_is_that_of_a_bootstrap():
    random = np.random.default_rng(0)
    weights_D = random.integers(5, 60, 80).astype(float)
    rates_D = 3 + random.normal(0, 0.4, 80) + 5 / weights_D  # short documents are harder
    found = document_estimates(jnp.asarray(rates_D * weights_D), jnp.asarray(weights_D))["loss"]
    drawn = random.integers(0, 80, (20_000, 80))
    ratios = (rates_D * weights_D)[drawn].sum(1) / weights_D[drawn].sum(1)
    assert float(found.mean) == pytest.approx((rates_D * weights_D).sum() / weights_D.sum(), 1e-6)
    assert float(found.sem) == pytest.approx(ratios.std(), rel=0.05)
    assert (found.num_samples, found.over) == (80, "documents")


@pytest.mark.parametrize("number", [5, NUM_PARTS, 83])
def test_values_of_parts_give_the_loss_and_the_jackknife_error_of_a_paired_difference(number):
    """The jackknife leaves out one part at a time, for the difference of two models' losses."""
    random = np.random.default_rng(number)
    weights_D = random.integers(50, 60, number).astype(float)
    sums_2xD = weights_D * (3 + random.normal(0, 0.3, number) + random.normal(0, 0.02, (2, number)))
    found = [document_estimates(jnp.asarray(s), jnp.asarray(weights_D)) for s in sums_2xD]
    names = [name for name in found[0] if name != "loss"]
    P = min(number, NUM_PARTS)
    assert len(names) == P
    values_2xP = np.array([[float(one[name].mean) for name in names] for one in found])
    for values_P, one in zip(values_2xP, found, strict=True):
        assert values_P.mean() == pytest.approx(float(one["loss"].mean), rel=1e-6)
    differences_P = values_2xP[1] - values_2xP[0]

    def loss_difference(kept_D):
        return np.subtract(*(s[kept_D].sum() / weights_D[kept_D].sum() for s in sums_2xD[::-1]))

    parts_D = np.arange(number) % P
    left_out = [loss_difference(parts_D != k) for k in range(P)]
    jackknife = np.sqrt((P - 1) / P * np.square(left_out - np.mean(left_out)).sum())
    paired = differences_P.std(ddof=1) / np.sqrt(P)
    assert paired == pytest.approx(jackknife, rel=0.05)
    assert paired < 0.5 * float(found[0]["loss"].sem)  # what documents share cancels
