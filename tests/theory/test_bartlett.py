"""Matrices of small models against gradients one by one, and languages against brute force."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.languages.sentences import mask_id
from jaxflat.theory import check_bartlett as bartlett
from jaxflat.theory.tiny_language import (
    all_questions,
    saturated_network,
    saturated_table,
    sentence_probs,
    tiny_hmm,
)

MAKE = {
    "network": lambda questions, key: saturated_network(questions, key, hidden=8),
    "table": lambda questions, key: saturated_table(questions, key, rank=4, scale=1.5),
}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def make(name, seed):
    questions = all_questions(tiny_hmm(seed, num_words=3, length=2))
    return MAKE[name](questions, jax.random.key(seed))


def test_sentences_have_the_probabilities_of_all_their_states():
    language = tiny_hmm(1, num_words=3, length=3)
    start_K, step_KxK, words_KxV = (np.asarray(x) for x in jax.tree.leaves(language))
    found = sentence_probs(language)
    for words in product(range(3), repeat=3):
        total = 0.0
        for states in product(range(2), repeat=3):
            path = start_K[states[0]] * step_KxK[states[0], states[1]] * step_KxK[states[1:]]
            total += path * np.prod([words_KxV[k, v] for k, v in zip(states, words, strict=True)])
        np.testing.assert_allclose(found[words], total, rtol=1e-12)


def test_questions_are_all_there_and_their_answers_are_the_oracle():
    language = tiny_hmm(2, num_words=3, length=3)
    questions = all_questions(language)
    assert len({tuple(row) for row in questions.inputs_CxT}) == len(questions.inputs_CxT) == 27
    np.testing.assert_allclose(questions.weights_C.sum(), 1)
    masked_CxT = questions.inputs_CxT == mask_id(3)
    assert (masked_CxT.sum(axis=1) == 1).all()
    tokens_CxT = jnp.asarray(np.where(masked_CxT, 0, questions.inputs_CxT), jnp.int32)
    lengths_C = jnp.full(27, 3, jnp.int32)
    oracle = language.conditional_log_probs(tokens_CxT, lengths_C, jnp.asarray(masked_CxT))
    np.testing.assert_allclose(questions.probs_CxV, np.exp(oracle)[masked_CxT], rtol=1e-12)
    for t in range(3):
        np.testing.assert_allclose(questions.weights_C[masked_CxT[:, t]].sum(), 1 / 3)


@pytest.mark.parametrize(
    ("name", "size"), [("network", 0.0), ("network", 0.3), ("table", 0.0), ("table", 0.3)]
)
def test_matrices_against_gradients_one_by_one(name, size):
    problem, params_P = make(name, 0)
    params_P += size * jax.random.normal(jax.random.key(5), params_P.shape)
    gradient = jax.jit(jax.value_and_grad(lambda p, c, v: problem.log_probs(p)[c, v]))
    cells = list(product(*map(range, problem.probs_CxV.shape)))
    log_probs_N, gradients_NxP = zip(*(gradient(params_P, *cell) for cell in cells), strict=True)
    model_CxV = np.exp(np.reshape(log_probs_N, problem.probs_CxV.shape))
    gradients_NxP = np.asarray(gradients_NxP)
    weights_N = np.asarray([problem.weights_C[c] for c, _ in cells])
    true_N = weights_N * np.asarray([problem.probs_CxV[cell] for cell in cells])
    model_N = weights_N * np.asarray([model_CxV[cell] for cell in cells])
    centred_NxP = gradients_NxP - true_N @ gradients_NxP
    names = ("gradient_covariance", "gauss_newton", "trace", "excess_loss", "hessian")
    found = jax.jit(lambda p: {name: getattr(problem, name)(p) for name in names})(params_P)
    expected = (centred_NxP * true_N[:, None]).T @ centred_NxP
    np.testing.assert_allclose(found["gradient_covariance"], expected, atol=1e-12)
    gap = np.linalg.norm(expected - found["hessian"]) / np.linalg.norm(found["hessian"])
    expected = (gradients_NxP * model_N[:, None]).T @ gradients_NxP
    np.testing.assert_allclose(found["gauss_newton"], expected, atol=1e-12)
    squares = (true_N * (gradients_NxP**2).sum(axis=1)).sum()
    np.testing.assert_allclose(found["trace"], squares, rtol=1e-12)
    true_CxV = np.asarray(problem.probs_CxV)
    divergence_C = (true_CxV * np.log(true_CxV / model_CxV)).sum(axis=1)
    excess = np.asarray(problem.weights_C) @ divergence_C
    np.testing.assert_allclose(found["excess_loss"], excess, atol=1e-14)
    assert gap < 1e-11 if size == 0 else gap > 1e-2
    assert excess < 1e-15 if size == 0 else excess > 1e-3


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_powers_are_those_of_the_curve(power):
    excess_DxL = np.logspace(-9, 1, 12)[None] * np.asarray([[1.0], [3.0]])
    gap_DxL = 2 * excess_DxL**power * np.where(excess_DxL < 1e-3, 1, 5)
    np.testing.assert_allclose(bartlett.powers(excess_DxL, gap_DxL, 1e-3), power, rtol=1e-9)
