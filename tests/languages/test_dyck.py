"""Zero-sum strings against a list of all of them."""

import dataclasses
from itertools import product

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxflat.languages.batches import sampled_batch
from jaxflat.languages.dyck import random_dyck
from jaxflat.languages.sentences import Sentences

LANGUAGE = random_dyck(0, length=8, min_length=4, tasks=(1, 5, 8))
ALL = {n: [w for w in product((0, 1), repeat=n) if 2 * sum(w) == n] for n in (4, 6, 8)}


def _padded(strings: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens_BxT, lengths_B), with a 1 past the ends, which must not count."""
    rows = [list(words) + [1] * (8 - len(words)) for words in strings]
    return np.array(rows, np.int32), np.array(list(map(len, strings)), np.int32)


@pytest.mark.parametrize("x64", [False, True])
def test_conditionals_equal_enumeration(x64):
    rng = np.random.default_rng(0)
    strings = [ALL[n][i] for n in ALL for i in rng.integers(0, len(ALL[n]), 20)]
    tokens_BxT, lengths_B = _padded(strings)
    masked_BxT = rng.random(tokens_BxT.shape) < rng.random((len(strings), 1))
    masked_BxT[::4] = False
    inputs_BxT = np.where(masked_BxT, LANGUAGE.num_words + 1, tokens_BxT)
    with jax.enable_x64(x64):
        logp_BxTxV = LANGUAGE.conditional_log_probs(inputs_BxT, lengths_B, masked_BxT)
        bare_BxTxV = LANGUAGE.conditional_log_probs(tokens_BxT, lengths_B)
    assert logp_BxTxV.dtype == (np.float64 if x64 else np.float32)
    assert np.isfinite(logp_BxTxV).all()
    np.testing.assert_array_equal(bare_BxTxV[::4], logp_BxTxV[::4])
    for b, words in enumerate(strings):
        for t in range(len(words)):
            hidden = masked_BxT[b, : len(words)] | (np.arange(len(words)) == t)
            fits = [o for o in ALL[len(words)] if (hidden | (np.array(o) == words)).all()]
            expected = np.mean([other[t] for other in fits])
            np.testing.assert_allclose(
                np.exp(logp_BxTxV[b, t]), [1 - expected, expected], rtol=1e-6, atol=1e-30
            )
        np.testing.assert_allclose(np.exp(logp_BxTxV[b, len(words) :]), 0.5, rtol=1e-6)


def test_no_completion_is_uniform():
    """With more pluses seen than can be, no completion exists, so the conditional is uniform."""
    tokens_BxT, lengths_B = _padded([(1, 1, 1, 1), (1, 1, 1, 0)])
    logp_BxTxV = LANGUAGE.conditional_log_probs(tokens_BxT, lengths_B)
    np.testing.assert_allclose(np.exp(logp_BxTxV[0]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.exp(logp_BxTxV[1, :, 1]), [0, 0, 0, 0.5, *[0.5] * 4], atol=1e-30)


def test_sampling_is_uniform_over_lengths_and_strings():
    sentences = LANGUAGE.sample(jax.random.key(0), 60_000)
    tokens_BxT, lengths_B = np.asarray(sentences.tokens_BxT), np.asarray(sentences.lengths_B)
    assert (tokens_BxT[np.arange(8) >= lengths_B[:, None]] == LANGUAGE.num_words).all()
    probs = {words: 1 / 3 / len(ALL[n]) for n in ALL for words in ALL[n]}
    counts = dict.fromkeys(probs, 0)
    for row, length in zip(tokens_BxT.tolist(), lengths_B, strict=True):
        counts[tuple(row[:length])] += 1
    expected = np.array(list(probs.values())) * len(tokens_BxT)
    assert chisquare(list(counts.values()), expected).pvalue > 1e-3
    few = LANGUAGE.sample(jax.random.key(0), 8)
    np.testing.assert_array_equal(few.tokens_BxT, tokens_BxT[:8])
    np.testing.assert_array_equal(few.lengths_B, lengths_B[:8])


@pytest.mark.parametrize("labeling", ["latent", "map"])
def test_tasks_are_sums_of_prefixes(labeling):
    strings = [words for n in ALL for words in ALL[n]]
    sentences = Sentences(*_padded(strings), latents=None)
    assert list(LANGUAGE.tasks) == ["sum_1", "sum_5", "sum_8"]
    for task, t in zip(LANGUAGE.tasks.values(), (1, 5, 8), strict=True):
        labels_B, valid_B = map(np.asarray, task.labels(sentences, labeling))
        probs_BxC = np.asarray(task.posterior(sentences))
        assert labels_B.dtype == np.int32
        assert probs_BxC.shape == (len(strings), task.num_classes) == (len(strings), t + 1)
        np.testing.assert_allclose(probs_BxC.sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_array_equal(valid_B, [len(words) >= t for words in strings])
        for b in np.flatnonzero(valid_B):
            total = sum(2 * word - 1 for word in strings[b][:t])
            assert 2 * labels_B[b] - t == total
            assert probs_BxC[b, labels_B[b]] == 1


def test_it_is_an_argument_without_arrays():
    assert jax.tree.leaves(LANGUAGE) == []
    batch = jax.jit(sampled_batch, static_argnums=(2, 3))(LANGUAGE, jax.random.key(0), 4, "exact")
    np.testing.assert_allclose(batch.targets_BxMxV.max(axis=2), 1)  # one masked word is known
    shorter = dataclasses.replace(LANGUAGE, length=4)
    assert shorter.sample(jax.random.key(0), 2).tokens_BxT.shape == (2, 4)
    task = jax.jit(lambda task, sentences: task.labels(sentences))
    labels_B, _ = task(LANGUAGE.tasks["sum_1"], LANGUAGE.sample(jax.random.key(0), 4))
    assert labels_B.shape == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_length": 10}, r"min_length must be in 2\.\.length=8; got 10"),
        ({"min_length": 0}, r"min_length must be in 2\.\.length=8; got 0"),
        ({"length": 9}, "length and min_length must be even; got 9, 4"),
        ({"min_length": 5}, "length and min_length must be even; got 8, 5"),
        ({"tasks": (9,)}, r"tasks must be positions in 1\.\.length=8; got 9"),
        ({"tasks": (0,)}, r"tasks must be positions in 1\.\.length=8; got 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        random_dyck(0, **({"length": 8, "min_length": 4, "tasks": ()} | change))
