"""Hidden Markov models against dynamax, an independent implementation of their inference."""

import dataclasses
import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.languages.hmm import Hmm, random_hmm
from jaxflat.languages.sentences import Sentences
from tests.support.counts import in_full

pytest.importorskip("dynamax")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # dynamax imports code that JAX deprecates
    from dynamax.hidden_markov_model import hmm_smoother

T, SENTENCES = 16, 6


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@cache
def language() -> Hmm:
    hmm = random_hmm(
        0,
        num_states=100,
        num_words=200,
        length=T,
        min_length=4,
        transition_concentration=0.1,
        emission_concentration=0.1,
        tasks=tuple(range(1, T + 1)),
    )
    names = ("start_K", "transitions_KxK", "emissions_KxV")
    tables = {name: np.asarray(getattr(hmm, name), np.float64) for name in names}
    # Rounded to float32, rows sum to 1 within 1e-7 only, and the two treat that differently.
    tables = {name: rows / rows.sum(axis=-1, keepdims=True) for name, rows in tables.items()}
    return dataclasses.replace(hmm, **tables)


@cache
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens_BxT, lengths_B) of sampled words, with the shortest and the longest length."""
    hmm = language()
    full = dataclasses.replace(hmm, min_length=T).sample(jax.random.key(1), SENTENCES)
    lengths_B = np.linspace(hmm.min_length, T, SENTENCES).astype(np.int32)
    past_end_BxT = np.arange(T) >= lengths_B[:, None]
    return np.where(past_end_BxT, hmm.num_words, full.tokens_BxT).astype(np.int32), lengths_B


def smoothed(hidden: np.ndarray) -> np.ndarray:
    """Return p(state at each position | the words that are not hidden).

    hidden: ...xBxT, with any leading axes. Hidden words and pads have likelihood 1 in every state.
    """
    hmm, (tokens_BxT, lengths_B) = language(), batch()
    words_BxT = np.arange(T) < lengths_B[:, None]
    likely_BxTxK = np.ascontiguousarray(hmm.emissions_KxV.T)[np.where(words_BxT, tokens_BxT, 0)]
    with np.errstate(divide="ignore"):
        log_BxTxK = np.log(likely_BxTxK)
    seen = (words_BxT & ~hidden)[..., None]
    logs = np.where(seen, log_BxTxK, 0.0).reshape(-1, T, hmm.num_symbols)

    @jax.jit
    @jax.vmap
    def smooth(logs_TxK):
        tables = jnp.asarray(hmm.start_K), jnp.asarray(hmm.transitions_KxK)
        return hmm_smoother(*tables, logs_TxK).smoothed_probs

    return np.asarray(smooth(logs)).reshape(*hidden.shape, hmm.num_symbols)


@pytest.mark.slow
def test_state_posteriors():
    hmm, (tokens_BxT, lengths_B) = language(), batch()
    expected_BxTxK = smoothed(np.zeros_like(tokens_BxT, bool))
    sentences = Sentences(tokens_BxT, lengths_B, latents=None)
    for position, task in enumerate(hmm.tasks.values()):
        probs_BxK = np.asarray(task.posterior(sentences))
        assert probs_BxK.dtype == np.float64
        np.testing.assert_allclose(probs_BxK, expected_BxTxK[:, position], rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.3, 1.0, *in_full(0.0, 0.8)], ids="masked_{}".format)
@pytest.mark.slow
def test_conditionals_given_any_subset_of_the_words(share):
    """p(v) = sum_k p(state k at t | the others) P(k emits v), whether or not t is masked."""
    hmm, (tokens_BxT, lengths_B) = language(), batch()
    words_BxT = np.arange(T) < lengths_B[:, None]
    masked_BxT = words_BxT & (np.random.default_rng(3).random(words_BxT.shape) < share)
    hidden_TxBxT = masked_BxT[None] | np.eye(T, dtype=bool)[:, None]
    states_TxBxK = np.stack([s[:, t] for t, s in enumerate(smoothed(hidden_TxBxT))])
    expected_TxBxV = states_TxBxK @ hmm.emissions_KxV
    expected_TxBxV /= expected_TxBxV.sum(axis=2, keepdims=True)
    inputs_BxT = np.where(masked_BxT, hmm.num_words + 1, tokens_BxT)
    logp_BxTxV = hmm.conditional_log_probs(inputs_BxT, lengths_B, masked_BxT)
    found_BxTxV = np.exp(np.asarray(logp_BxTxV))
    expected_BxTxV = expected_TxBxV.swapaxes(0, 1)
    np.testing.assert_allclose(
        found_BxTxV[words_BxT], expected_BxTxV[words_BxT], rtol=0, atol=1e-12
    )
    assert found_BxTxV[words_BxT].max() > 2 / hmm.num_words
