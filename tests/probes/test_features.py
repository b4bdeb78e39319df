"""Features of a sentence from the representations of its words."""

import jax
import numpy as np
import pytest

from jaxflat.probes.features import pool, random_projection, span_mean

LENGTHS_N = np.array([1, 3, 4], np.int32)
FEATURES_NxTxD = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)


def test_the_mean_is_over_the_words_alone():
    pooled_NxF = pool(FEATURES_NxTxD, LENGTHS_N, "mean")
    expected = [rows[:n].mean(axis=0) for rows, n in zip(FEATURES_NxTxD, LENGTHS_N, strict=True)]
    assert pooled_NxF.dtype == np.float32
    np.testing.assert_allclose(pooled_NxF, expected, rtol=1e-5)


def test_concatenated_words_keep_their_positions_and_padding_is_zero():
    pooled_NxF = pool(FEATURES_NxTxD, LENGTHS_N, "concatenate")
    inside_NxTx1 = (np.arange(4) < LENGTHS_N[:, None])[..., None]
    expected_NxTxD = np.where(inside_NxTx1, FEATURES_NxTxD, 0)
    np.testing.assert_array_equal(pooled_NxF, expected_NxTxD.reshape(3, -1))


@pytest.mark.parametrize("pooling", ["mean", "concatenate"])
def test_padding_changes_nothing(pooling):
    inside_NxTx1 = (np.arange(4) < LENGTHS_N[:, None])[..., None]
    other_NxTxD = np.where(inside_NxTx1, FEATURES_NxTxD, np.float32(1e6))
    np.testing.assert_array_equal(
        pool(FEATURES_NxTxD, LENGTHS_N, pooling), pool(other_NxTxD, LENGTHS_N, pooling)
    )


def test_a_span_is_the_mean_of_its_words_within_the_sentence():
    found_NxD = span_mean(FEATURES_NxTxD, LENGTHS_N, (1, 3))
    expected = [np.zeros(2), FEATURES_NxTxD[1, 1:3].mean(0), FEATURES_NxTxD[2, 1:3].mean(0)]
    np.testing.assert_allclose(found_NxD, expected, rtol=1e-5)
    one_NxD = span_mean(FEATURES_NxTxD, LENGTHS_N, (0, 1))
    np.testing.assert_array_equal(one_NxD, FEATURES_NxTxD[:, 0])


@pytest.mark.parametrize(("num_features", "dimension"), [(12, 5), (5, 12), (7, 7)])
def test_a_projection_is_orthonormal_and_its_key_decides_it(num_features, dimension):
    matrix = random_projection(jax.random.key(0), num_features, dimension)
    assert matrix.shape == (num_features, dimension)
    gram = matrix.T @ matrix if num_features >= dimension else matrix @ matrix.T
    np.testing.assert_allclose(gram, np.eye(min(num_features, dimension)), atol=1e-5)
    np.testing.assert_array_equal(
        matrix, random_projection(jax.random.key(0), num_features, dimension)
    )
    other = random_projection(jax.random.key(1), num_features, dimension)
    assert np.abs(matrix - other).max() > 0.1


def test_a_projection_keeps_squared_lengths_in_proportion_to_the_dimension():
    features = np.random.default_rng(1).normal(size=64).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 500)
    lengths = jax.vmap(lambda key: ((features @ random_projection(key, 64, 16)) ** 2).sum())(keys)
    expected = (features**2).sum() * 16 / 64
    np.testing.assert_allclose(lengths.mean(), expected, rtol=0.05)
