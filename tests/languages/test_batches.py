"""Masks of sentences, and the questions about the masked words."""

from collections import Counter
from functools import cache
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxflat.languages import batches
from jaxflat.languages.batches import EVALUATED_MASKS, make_questions, mask_each
from jaxflat.languages.sentences import Sentences
from jaxflat.training.objectives import prediction_losses
from tests.support.counts import in_full
from tests.support.enumeration import (
    Derivations,
    MadeOnDemand,
    derivations,
    ragged_batch,
    small_hmm,
    small_levelled,
)

mask_one, mask_share = jax.jit(batches.mask_one), jax.jit(batches.mask_share)
make_batch = jax.jit(batches.make_batch, static_argnums=(3, 4))

V, MASK = 9, 10
LENGTHS_B = np.array([1, 3, 4], np.int32)
TOKENS_BxT = np.where(np.arange(4) < LENGTHS_B[:, None], [[0, 1, 2, 3]], V).astype(np.int32)


def test_mask_one_is_uniform_over_the_words():
    tokens_BxT, lengths_B = np.repeat(TOKENS_BxT, 4000, axis=0), np.repeat(LENGTHS_B, 4000)
    inputs_BxT, positions_Bx1 = map(
        np.asarray, mask_one(jax.random.key(0), tokens_BxT, lengths_B, MASK)
    )
    masked_BxT = np.arange(4) == positions_Bx1
    assert (inputs_BxT[masked_BxT] == MASK).all()
    np.testing.assert_array_equal(inputs_BxT[~masked_BxT], tokens_BxT[~masked_BxT])
    for length in LENGTHS_B:
        counts = np.bincount(positions_Bx1[lengths_B == length, 0], minlength=4)
        assert counts[length:].sum() == 0
        assert length == 1 or chisquare(counts[:length]).pvalue > 1e-3


def test_mask_each_masks_every_word_once():
    inputs_BxTxT = np.asarray(mask_each(TOKENS_BxT, LENGTHS_B, MASK))
    np.testing.assert_array_equal(
        inputs_BxTxT[1],
        [[MASK, 1, 2, V], [0, MASK, 2, V], [0, 1, MASK, V], [0, 1, 2, V]],
    )
    np.testing.assert_array_equal((inputs_BxTxT == MASK).sum(axis=(1, 2)), LENGTHS_B)


def shared(lengths_B: np.ndarray, T: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return (tokens_BxT, inputs_BxT, positions_BxM, chosen_BxM) of random sentences."""
    inside_BxT = np.arange(T) < lengths_B[:, None]
    words_BxT = np.random.default_rng(seed).integers(0, V, inside_BxT.shape)
    tokens_BxT = np.where(inside_BxT, words_BxT, V).astype(np.int32)
    masked = mask_share(jax.random.key(seed), tokens_BxT, lengths_B, MASK)
    return tokens_BxT, *map(np.asarray, masked)


def number_masked(lengths_B: np.ndarray) -> np.ndarray:
    """15% rounded to a whole number, 1 to 5; 1.5, 4.5 and so on to the even neighbour."""
    return np.clip(np.rint(np.float32(0.15) * lengths_B.astype(np.float32)), 1, 5).astype(int)


@pytest.mark.parametrize("T", [1, 3, 5, 8, 50])
def test_mask_share_hides_15_percent_of_the_words_and_nothing_else(T):
    lengths_B = np.tile(np.arange(1, T + 1, dtype=np.int32), 20)
    tokens_BxT, inputs_BxT, positions_BxM, chosen_BxM = shared(lengths_B, T)
    assert (inputs_BxT.dtype, positions_BxM.dtype, chosen_BxM.dtype) == (np.int32, np.int32, bool)
    assert positions_BxM.shape == chosen_BxM.shape == (len(lengths_B), min(T, 5))
    number_B = chosen_BxM.sum(axis=1)
    np.testing.assert_array_equal(number_B, number_masked(lengths_B))
    assert (np.abs(number_B - np.clip(0.15 * lengths_B, 1, 5)) < 0.5 + 1e-6).all()
    assert ((positions_BxM >= 0) & (positions_BxM < lengths_B[:, None])).all()
    # Chosen positions come first and are distinct; the others repeat the first one.
    np.testing.assert_array_equal(chosen_BxM, np.arange(min(T, 5)) < number_B[:, None])
    first_BxM = np.broadcast_to(positions_BxM[:, :1], positions_BxM.shape)
    np.testing.assert_array_equal(positions_BxM[~chosen_BxM], first_BxM[~chosen_BxM])
    masked_BxT = np.zeros(tokens_BxT.shape, bool)
    for b, number in enumerate(number_B):
        masked_BxT[b, positions_BxM[b, :number]] = True
    np.testing.assert_array_equal(masked_BxT.sum(axis=1), number_B)
    np.testing.assert_array_equal(inputs_BxT, np.where(masked_BxT, MASK, tokens_BxT))


@pytest.mark.parametrize("length", [2, 7, 13, 20])
def test_mask_share_is_uniform_over_subsets_and_their_order(length):
    lengths_B = np.full(12_000, length, np.int32)
    _, _, positions_BxM, chosen_BxM = shared(lengths_B, T=21, seed=length)
    number = chosen_BxM[0].sum()
    assert number == number_masked(lengths_B)[0]
    drawn = Counter(tuple(sorted(row)) for row in positions_BxM[:, :number].tolist())
    counts = [drawn[subset] for subset in combinations(range(length), int(number))]
    assert sum(counts) == len(lengths_B)
    assert chisquare(counts).pvalue > 1e-3
    assert chisquare(np.bincount(positions_BxM[:, 0], minlength=length)).pvalue > 1e-3


def test_the_longest_sentences_have_five_masks_and_other_keys_others():
    lengths_B = np.full(64, 200, np.int32)
    _, _, positions_BxM, chosen_BxM = shared(lengths_B, T=200)
    assert chosen_BxM.all()
    assert len({tuple(row) for row in positions_BxM.tolist()}) == 64
    tokens_BxT = np.zeros((64, 200), np.int32)
    same = [mask_share(jax.random.key(0), tokens_BxT, lengths_B, MASK)[1] for _ in range(2)]
    np.testing.assert_array_equal(same[0], positions_BxM)
    np.testing.assert_array_equal(same[1], positions_BxM)
    other = mask_share(jax.random.key(1), tokens_BxT, lengths_B, MASK)[1]
    assert (np.asarray(other) != positions_BxM).mean() > 0.9


# Sentences are long enough for two masked words, and languages small enough to enumerate all
# derivations: 2^11 paths of states, and trees with two symbols at one level only.
LANGUAGES = MadeOnDemand(
    {
        "hmm": lambda: small_hmm(11, num_states=2, num_words=3, length=11, min_length=9),
        "levelled": lambda: small_levelled(
            12, (1, 1, 2, 1, 1), num_words=3, length=10, min_length=9
        ),
    }
)


@cache
def all_derivations(name: str, length: int) -> Derivations:
    return derivations(LANGUAGES[name], length)


def ragged_sentences(name: str) -> Sentences:
    tokens_BxT, lengths_B = ragged_batch(LANGUAGES[name], seed=3, batch_size=8)
    return Sentences(jnp.asarray(tokens_BxT), jnp.asarray(lengths_B), None)


def assert_exact(name, sentences, b, inputs_T, position, p_V):
    """Compare p_V with the sum over all completions for the word at `position`."""
    length = int(sentences.lengths_B[b])
    words = tuple(np.asarray(sentences.tokens_BxT)[b, :length].tolist())
    hidden = LANGUAGES[name].num_words + 1
    masked = set(np.flatnonzero(np.asarray(inputs_T)[:length] == hidden).tolist())
    assert int(position) in masked
    expected_V = all_derivations(name, length).conditional(words, int(position), masked)
    np.testing.assert_allclose(p_V, expected_V, rtol=0, atol=1e-9)


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("name", "masking"),
    [("hmm", "one"), ("levelled", "share"), *in_full(("hmm", "share"), ("levelled", "one"))],
)
@pytest.mark.slow
def test_exact_targets_equal_enumeration(name, masking):
    language, sentences = LANGUAGES[name], ragged_sentences(name)
    batch = make_batch(language, jax.random.key(5), sentences, "exact", masking)
    weights_BxM = np.asarray(batch.weights_BxM)
    assert batch.targets_BxMxV.dtype == batch.weights_BxM.dtype == np.float64
    assert weights_BxM.sum(axis=1).max() == (2 if masking == "share" else 1)
    np.testing.assert_array_equal(batch.lengths_B, sentences.lengths_B)
    for b, m in np.ndindex(weights_BxM.shape):
        # Predictions of weight 0 repeat the first word's conditional.
        position = batch.positions_BxM[b, m]
        targets_V = batch.targets_BxMxV[b, m]
        assert_exact(name, sentences, b, batch.inputs_BxT[b], position, targets_V)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("name", "masking", "num_positions"),
    [
        *(("levelled", "one", 0), ("hmm", "one", 3), ("hmm", "share", 0)),
        *in_full(("hmm", "one", 0), ("levelled", "one", 3), ("levelled", "share", 0)),
    ],
)
@pytest.mark.slow
def test_questions_have_the_words_their_weights_and_the_exact_answers(name, masking, num_positions):
    language, sentences = LANGUAGES[name], ragged_sentences(name)
    tokens_SxT, lengths_S = map(np.asarray, (sentences.tokens_BxT, sentences.lengths_B))
    (S, T), hidden = tokens_SxT.shape, language.num_words + 1
    asked = make_questions(language, jax.random.key(6), sentences, masking, num_positions)
    R, M = (num_positions or T, 1) if masking == "one" else (EVALUATED_MASKS, 5)
    assert asked.inputs_SxRxT.shape == (S, R, T)
    assert asked.log_probs_SxRxMxV.shape == (S, R, M, language.num_words)
    assert asked.log_probs_SxRxMxV.dtype == asked.weights_SxRxM.dtype == np.float64
    inputs_SxRxT, positions_SxRxM, weights_SxRxM, words_SxRxM = map(
        np.asarray,
        (asked.inputs_SxRxT, asked.positions_SxRxM, asked.weights_SxRxM, asked.words_SxRxM),
    )
    masked_SxRxT = inputs_SxRxT == hidden
    np.testing.assert_array_equal(inputs_SxRxT, np.where(masked_SxRxT, hidden, tokens_SxT[:, None]))
    if masking == "one":
        np.testing.assert_allclose(weights_SxRxM.sum(axis=(1, 2)), 1)
        once_SxR = np.ones((S, R)) if num_positions else np.arange(T) < lengths_S[:, None]
        np.testing.assert_array_equal(masked_SxRxT.sum(axis=2), once_SxR)
    else:
        assert set(np.unique(weights_SxRxM)) == {0.0, 1.0}
        number_S = number_masked(lengths_S)
        np.testing.assert_array_equal(weights_SxRxM.sum(axis=2), np.tile(number_S[:, None], R))
        np.testing.assert_array_equal(masked_SxRxT.sum(axis=2), np.tile(number_S[:, None], R))
        assert (positions_SxRxM[:, 0] != positions_SxRxM[:, 1]).any()
    asked_about = 0
    for s, r, m in np.argwhere(weights_SxRxM > 0).tolist():
        position = positions_SxRxM[s, r, m]
        assert words_SxRxM[s, r, m] == tokens_SxT[s, position]
        answer_V = np.exp(asked.log_probs_SxRxMxV[s, r, m])
        assert_exact(name, sentences, s, inputs_SxRxT[s, r], position, answer_V)
        asked_about += 1
    assert asked_about == (once_SxR.sum() if masking == "one" else R * number_S.sum())

    right = prediction_losses(asked.log_probs_SxRxMxV, asked.log_probs_SxRxMxV, words_SxRxM)
    assert (np.asarray(right["excess_loss"]) == 0).all()
    uniform_V = jnp.full_like(asked.log_probs_SxRxMxV, -jnp.log(language.num_words))
    wrong = prediction_losses(uniform_V, asked.log_probs_SxRxMxV, words_SxRxM)
    assert (np.asarray(wrong["excess_loss"])[weights_SxRxM > 0] > 0).all()


@pytest.mark.parametrize("masking", ["one", "share"])
def test_sampled_targets_are_the_hidden_words_and_the_masks_those_of_exact_ones(masking):
    language, sentences = LANGUAGES["hmm"], ragged_sentences("hmm")
    key = jax.random.key(7)
    exact, sampled = (
        make_batch(language, key, sentences, targets, masking) for targets in ("exact", "sampled")
    )
    for field in ("inputs_BxT", "positions_BxM"):
        np.testing.assert_array_equal(getattr(exact, field), getattr(sampled, field))
    np.testing.assert_array_equal(exact.weights_BxM, sampled.weights_BxM)
    words_BxM = np.take_along_axis(
        np.asarray(sentences.tokens_BxT), np.asarray(sampled.positions_BxM), axis=1
    )
    np.testing.assert_array_equal(
        sampled.targets_BxMxV, np.eye(language.num_words, dtype=np.float32)[words_BxM]
    )


def test_positions_asked_for_are_uniform_over_the_words():
    language, sentences = LANGUAGES["hmm"], ragged_sentences("hmm")
    asked = make_questions(language, jax.random.key(8), sentences, "one", 2000)
    for length, positions_Rx1 in zip(sentences.lengths_B, asked.positions_SxRxM, strict=True):
        counts = np.bincount(np.asarray(positions_Rx1)[:, 0], minlength=int(length))
        assert len(counts) == length
        assert chisquare(counts).pvalue > 1e-3


def test_causal_batches_predict_each_next_symbol_and_the_stop_but_no_forced_one():
    language, sentences = LANGUAGES["hmm"], ragged_sentences("hmm")
    tokens_BxT, lengths_B = np.asarray(sentences.tokens_BxT), np.asarray(sentences.lengths_B)
    stop, T = language.num_words, tokens_BxT.shape[1]
    assert lengths_B.min() < lengths_B.max() == T == language.max_length
    batch = make_batch(language, jax.random.key(0), sentences, "sampled", "causal")
    np.testing.assert_array_equal(batch.inputs_BxT, tokens_BxT)
    symbols_BxM = np.argmax(batch.targets_BxMxV, axis=-1)
    for words_T, length, symbols_M, weights_M in zip(
        tokens_BxT, lengths_B, symbols_BxM, batch.weights_BxM, strict=True
    ):
        expected = [*words_T[:length], stop][:T]  # after T words the stop is certain
        np.testing.assert_array_equal(symbols_M[: len(expected)], expected)
        np.testing.assert_array_equal(weights_M, np.arange(T) < len(expected))


@pytest.mark.parametrize("targets", ["exact", "sampled"])
def test_a_cut_causal_batch_keeps_all_predictions_of_its_sentences(targets):
    language, sentences = LANGUAGES["hmm"], ragged_sentences("hmm")
    whole = make_batch(language, jax.random.key(0), sentences, targets, "causal")
    length = int(sentences.lengths_B.max()) - 1
    short_B = np.flatnonzero(np.asarray(sentences.lengths_B) <= length)
    batch = jax.tree.map(lambda x: x[short_B], whole)
    cut = batch.cut(length)
    assert cut.inputs_BxT.shape[1] == length
    assert cut.weights_BxM.sum() == batch.weights_BxM.sum() > 0
    for field in ("positions_BxM", "targets_BxMxV", "weights_BxM"):
        kept = getattr(batch, field)[:, : length + 1]
        np.testing.assert_array_equal(getattr(cut, field), kept)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", ["hmm", "levelled"])
@pytest.mark.slow
def test_causal_questions_have_the_exact_answers_and_equal_the_batch(name):
    """The mean optimal loss is -log p(sentence) by enumeration, without the forced stops."""
    language, sentences = LANGUAGES[name], ragged_sentences(name)
    asked = make_questions(language, jax.random.key(6), sentences, "causal")
    batch = make_batch(language, jax.random.key(6), sentences, "exact", "causal")
    np.testing.assert_array_equal(asked.positions_SxRxM[:, 0], batch.positions_BxM)
    np.testing.assert_array_equal(asked.weights_SxRxM[:, 0], batch.weights_BxM)
    np.testing.assert_allclose(np.exp(asked.log_probs_SxRxMxV[:, 0]), batch.targets_BxMxV)
    exact = prediction_losses(asked.log_probs_SxRxMxV, asked.log_probs_SxRxMxV, asked.words_SxRxM)
    assert (np.asarray(exact["excess_loss"]) == 0).all()
    losses_S = (exact["loss"] * asked.weights_SxRxM).sum((1, 2))
    log_probs_S = language.log_prob(sentences.tokens_BxT, sentences.lengths_B)
    np.testing.assert_allclose(losses_S, -log_probs_S, rtol=1e-9)
