"""Ridge regression of posteriors against numpy, and its error over test sentences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.languages.hmm import random_hmm
from jaxflat.languages.tasks import posteriors
from jaxflat.probes.features import span_mean
from jaxflat.probes.ridge import Beliefs, belief_errors
from jaxflat.runs.probe_estimates import determination_estimate

LEAST = jnp.asarray([1e-7])  # a penalty too small to matter
errors_of = jax.jit(belief_errors)


@partial(jax.jit, static_argnames=("num_sentences", "num_features"))
def problem(num_sentences: int, seed: int, mixing: float = 1.0, num_features: int = 5) -> Beliefs:
    """Posteriors of 3 symbols: a softmax of `mixing` times the features, plus noise."""
    keys = jax.random.split(jax.random.key(seed), 3)
    features_NxF = 2 + jax.random.normal(keys[0], (num_sentences, num_features))
    kernel_FxC = jax.random.normal(jax.random.key(99), (num_features, 3))
    logits_NxC = mixing * features_NxF @ kernel_FxC
    logits_NxC += jax.random.normal(keys[1], logits_NxC.shape)
    valid_N = jnp.arange(num_sentences) % 7 > 0
    return Beliefs(features_NxF, jax.nn.softmax(logits_NxC), valid_N)


def determination(*arguments) -> float:
    errors_N, spreads_N = errors_of(*arguments)
    return float(determination_estimate(errors_N[None], spreads_N).mean)


def test_without_penalty_it_is_least_squares():
    train, test = problem(400, 0), problem(300, 1)
    fit, held_out = (
        [np.asarray(x, np.float64)[np.asarray(part.valid_N)]
         for x in (part.features_NxF, part.probs_NxC)]
        for part in (train, test)
    )  # fmt: skip
    ones = [np.column_stack([x, np.ones(len(x))]) for x, _ in (fit, held_out)]
    solution = np.linalg.lstsq(ones[0], fit[1], rcond=None)[0]
    errors = ((held_out[1] - ones[1] @ solution) ** 2).sum()
    expected = 1 - errors / ((held_out[1] - held_out[1].mean(0)) ** 2).sum()
    assert 0.2 < expected < 0.9
    assert determination(train, test, test, LEAST) == pytest.approx(expected, abs=1e-5)


def test_a_penalty_shrinks_as_the_normal_equations_say():
    train, test = problem(200, 0), problem(100, 1)
    valid = np.asarray(train.valid_N)
    x, p = (np.asarray(a, np.float64)[valid] for a in (train.features_NxF, train.probs_NxC))
    centred = x - x.mean(0)
    scale = np.sqrt((centred**2).sum(1).mean())
    inputs, n = centred / scale, len(x)
    kernel = np.linalg.solve(
        inputs.T @ inputs / n + 0.3 * np.eye(5), inputs.T @ (p - p.mean(0)) / n
    )
    predicted = (np.asarray(test.features_NxF) - x.mean(0)) / scale @ kernel + p.mean(0)
    expected_N = np.where(test.valid_N, ((np.asarray(test.probs_NxC) - predicted) ** 2).sum(1), 0)
    errors_N, _ = errors_of(train, test, test, jnp.asarray([0.3]))
    np.testing.assert_allclose(errors_N, expected_N, atol=1e-5)


def test_features_that_contain_the_posterior_explain_it_all():
    parts = [problem(300, seed) for seed in range(3)]
    mixing = jax.random.normal(jax.random.key(5), (3, 3))
    known = [Beliefs(part.probs_NxC @ mixing - 1, part.probs_NxC, part.valid_N) for part in parts]
    assert determination(*known, LEAST) == pytest.approx(1, abs=1e-4)


def test_features_that_know_nothing_explain_nothing():
    parts = [problem(4000, seed, mixing=0, num_features=2) for seed in range(3)]
    errors_N, spreads_N = errors_of(*parts, LEAST)
    estimate = determination_estimate(errors_N[None], spreads_N)
    low, high = estimate.interval()
    assert low < 0 < high
    assert abs(estimate.mean) < 0.01


def test_validation_chooses_the_penalty_and_test_posteriors_play_no_part():
    train, validation, test = (
        problem(12, 0, num_features=10),
        *(problem(500, seed, num_features=10) for seed in (1, 2)),
    )
    penalties = jnp.asarray([1e-6, 1e-2, 1e3])
    missed = [errors_of(train, validation, validation, l2[None])[0].sum() for l2 in penalties]
    best = int(np.argmin(missed))
    chosen, _ = errors_of(train, validation, test, penalties)
    alone, _ = errors_of(train, validation, test, penalties[best : best + 1])
    np.testing.assert_allclose(chosen, alone, rtol=1e-5, atol=1e-7)
    assert float(max(missed)) > 1.1 * float(min(missed))


def test_the_error_covers_other_test_sentences():
    """Sentences with unequal spread from one distribution: the interval covers its R^2."""
    num_draws, num_sentences = 3000, 300

    def estimate(key: jax.Array, num_sentences: int) -> jax.Array:
        keys = jax.random.split(key, 3)
        scales_N = jnp.exp(0.5 * jax.random.normal(keys[0], (num_sentences,)))[:, None]
        probs_NxC = scales_N * jax.random.normal(keys[1], (num_sentences, 2))
        missed_NxC = 0.4 * probs_NxC + 0.3 * jax.random.normal(keys[2], (num_sentences, 2))
        spreads_N = ((probs_NxC - probs_NxC.mean(0)[None]) ** 2).sum(1)
        found = determination_estimate((missed_NxC**2).sum(1)[None], spreads_N)
        return jnp.stack([found.mean, found.sem])

    truth = 1 - 0.4**2 - 0.3**2 / np.exp(0.5)
    keys = jax.random.split(jax.random.key(0), num_draws)
    means, sems = np.asarray(jax.lax.map(lambda key: estimate(key, num_sentences), keys)).T
    assert means.mean() == pytest.approx(truth, abs=0.003)
    assert means.std(ddof=1) == pytest.approx(np.sqrt((sems**2).mean()), rel=0.06)
    assert 0.92 < (np.abs(means - truth) < 1.968 * sems).mean() < 0.97


def test_the_error_covers_draws_of_training_sentences_too():
    """Draws of unequal skill: the spread of the estimate equals its error."""

    def estimate(key: jax.Array) -> jax.Array:
        skill_key, key = jax.random.split(key)
        skills_D = 0.3 + 0.1 * jax.random.normal(skill_key, (8,))
        spreads_N = jax.random.exponential(key, (400,))
        found = determination_estimate(skills_D[:, None] * spreads_N[None], spreads_N)
        return jnp.stack([found.mean, found.sem])

    keys = jax.random.split(jax.random.key(0), 2000)
    means, sems = np.asarray(jax.lax.map(estimate, keys)).T
    assert means.std(ddof=1) == pytest.approx(np.sqrt((sems**2).mean()), rel=0.06)
    assert 0.93 < (np.abs(means - 0.7) < 2.365 * sems).mean() < 0.97


@pytest.mark.slow
def test_conditionals_around_a_state_hold_its_posterior_only_in_part():
    """The lookup table at a word does not see the word; the tables at its neighbours do.

    p(h | x) is proportional to p(h | x_-t) B_x, so p(x_t | x_-t) alone cannot give it.
    """
    hmm = random_hmm(
        3,
        num_states=3,
        num_words=6,
        length=4,
        min_length=4,
        transition_concentration=0.5,
        emission_concentration=0.3,
        tasks=(2,),
    )
    parts = []
    for seed in range(3):
        sentences = hmm.sample(jax.random.key(seed), 1000)
        table_NxTxV = jnp.exp(hmm.conditional_log_probs(sentences.tokens_BxT, sentences.lengths_B))
        probs_NxC = posteriors(hmm.tasks, sentences)["state_2"]
        local_NxV = span_mean(table_NxTxV, sentences.lengths_B, hmm.tasks["state_2"].span)
        words_NxV = jax.nn.one_hot(sentences.tokens_BxT[:, 1], 6)
        # Products such as p(x_t | x_-t) 1[x_t = v] contain the interactions of words.
        both_NxF = jnp.concatenate(
            [local_NxV, words_NxV, (local_NxV[:, :, None] * words_NxV[:, None]).reshape(1000, -1)],
            axis=1,
        )
        valid_N = jnp.ones(1000, bool)
        parts.append([Beliefs(x, probs_NxC, valid_N) for x in (local_NxV, both_NxF)])
    alone, together = (determination(*kind, LEAST) for kind in zip(*parts, strict=True))
    assert alone < 0.9
    assert together > alone + 0.1
