"""A language small enough to enumerate all questions, and models with exact answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from jaxflat.languages import LANGUAGES
from jaxflat.languages.hmm import Hmm
from jaxflat.languages.sentences import mask_id
from jaxflat.theory.saturated import SaturatedProblem


@dataclass(frozen=True)
class TinyQuestions:
    """All sentences with one masked word, their probabilities, and the exact answers."""

    inputs_CxT: np.ndarray
    weights_C: np.ndarray
    probs_CxV: np.ndarray
    num_words: int


def tiny_hmm(seed: int, num_words: int, length: int) -> Hmm:
    """Return a hidden Markov model of two states without rare words, in float64."""
    sizes = {"num_states": 2, "num_words": num_words, "length": length, "min_length": length}
    rows = {"transition_concentration": 1.0, "emission_concentration": 2.0}
    language = LANGUAGES["hmm"](seed, **sizes, **rows, tasks=())

    def exact(x: Array) -> Array:
        x = x.astype(jnp.result_type(float))
        return x / x.sum(axis=-1, keepdims=True)

    return jax.tree.map(exact, language)


def sentence_probs(language: Any) -> np.ndarray:
    """Return P(x) of every sentence of full length, V x ... x V: the product of p(x_t | x_<t)."""
    V, T = language.num_words, language.max_length
    tokens_BxT = jnp.asarray(np.indices((V,) * T).reshape(T, -1).T, jnp.int32)
    lengths_B = jnp.full(len(tokens_BxT), T, jnp.int32)
    log_probs_B = 0.0
    for t in range(T):
        unseen_BxT = jnp.broadcast_to(jnp.arange(T) >= t, tokens_BxT.shape)
        found_BxV = language.conditional_log_probs(tokens_BxT, lengths_B, unseen_BxT)[:, t]
        log_probs_B += jnp.take_along_axis(found_BxV, tokens_BxT[:, t, None], axis=1)[:, 0]
    return np.exp(np.asarray(log_probs_B)).reshape((V,) * T)


def all_questions(language: Any) -> TinyQuestions:
    """Mask one word, uniform over positions, in every sentence; all sentences have one length."""
    V, T = language.num_words, language.max_length
    joint = sentence_probs(language)
    tokens_NxT = np.indices((V,) * T).reshape(T, -1).T
    inputs, weights, probs = [], [], []
    for t in range(T):
        with_answers_CxV = np.moveaxis(joint, t, -1).reshape(-1, V)
        total_C = with_answers_CxV.sum(axis=1)
        inputs_CxT = tokens_NxT[tokens_NxT[:, t] == 0].copy()
        inputs_CxT[:, t] = mask_id(V)
        inputs.append(inputs_CxT)
        weights.append(total_C / T)
        probs.append(with_answers_CxV / total_C[:, None])
    columns = (np.concatenate(column) for column in (inputs, weights, probs))
    return TinyQuestions(*columns, num_words=V)


def problem_of(questions: TinyQuestions, logits_fn: Callable[[Array], Array]) -> SaturatedProblem:
    """Return the problem of a model on the questions."""
    return SaturatedProblem(
        logits_fn, jnp.asarray(questions.weights_C), jnp.asarray(questions.probs_CxV)
    )


def saturated_network(
    questions: TinyQuestions, key: Array, hidden: int
) -> tuple[SaturatedProblem, Array]:
    """Return a masked LM with one hidden layer and exact params_P.

    Its logits are tanh(sum_t E_t[x_t] + b) W + c. E is random and b is 0. With as many hidden units
    as questions, W can give every answer exactly.
    """
    V, T = questions.num_words, questions.inputs_CxT.shape[1]
    one_hot = np.eye(mask_id(V) + 1)[questions.inputs_CxT]
    inputs_CxF = jnp.asarray(one_hot.reshape(len(one_hot), -1))
    embedding_FxH = jax.random.normal(key, (inputs_CxF.shape[1], hidden)) / T**0.5
    features_CxH = np.tanh(np.asarray(inputs_CxF @ embedding_FxH))
    weights_HxV, *_ = np.linalg.lstsq(features_CxH, np.log(questions.probs_CxV), rcond=None)
    params_P, unravel = ravel_pytree(
        {
            "embedding": embedding_FxH,
            "bias": jnp.zeros(hidden),
            "weights": jnp.asarray(weights_HxV),
            "offsets": jnp.zeros(V),
        }
    )

    def logits_fn(params_P: Array) -> Array:
        params = unravel(params_P)
        hidden_CxH = jnp.tanh(inputs_CxF @ params["embedding"] + params["bias"][None])
        return hidden_CxH @ params["weights"] + params["offsets"][None]

    return problem_of(questions, logits_fn), params_P


def saturated_table(
    questions: TinyQuestions, key: Array, rank: int, scale: float
) -> tuple[SaturatedProblem, Array]:
    """Return a table in two factors, logits = R K, and exact params_P.

    R is C x rank, K is rank x V, and rank >= V. The columns of K are orthogonal, in random
    directions, with length `scale`. R compensates: this is one of many exact factorisations.
    """
    C, V = questions.probs_CxV.shape
    columns_RxV = scale * np.linalg.qr(np.asarray(jax.random.normal(key, (rank, V))))[0]
    rows_CxR = np.log(questions.probs_CxV) @ columns_RxV.T / scale**2

    def logits_fn(params_P: Array) -> Array:
        rows_CxR, columns_RxV = params_P[: C * rank], params_P[C * rank :]
        return rows_CxR.reshape(C, rank) @ columns_RxV.reshape(rank, V)

    params_P = jnp.asarray(np.concatenate([rows_CxR.reshape(-1), columns_RxV.reshape(-1)]))
    return problem_of(questions, logits_fn), params_P
