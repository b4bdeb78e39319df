"""From the representations of words to one vector a sentence."""

import numpy as np
import pytest

from jaxflat.probes.features import pool

LENGTHS_N = np.array([1, 3, 4], np.int32)
FEATURES_NxTxD = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)


def test_the_mean_is_over_the_words_alone():
    pooled_NxF = pool(FEATURES_NxTxD, LENGTHS_N, "mean")
    expected = [rows[:n].mean(axis=0) for rows, n in zip(FEATURES_NxTxD, LENGTHS_N, strict=True)]
    assert pooled_NxF.dtype == np.float32
    np.testing.assert_allclose(pooled_NxF, expected, rtol=1e-5)


def test_concatenated_words_keep_their_places_and_the_rest_is_zero():
    pooled_NxF = pool(FEATURES_NxTxD, LENGTHS_N, "concatenate")
    inside_NxTx1 = (np.arange(4) < LENGTHS_N[:, None])[..., None]
    expected_NxTxD = np.where(inside_NxTx1, FEATURES_NxTxD, 0)
    np.testing.assert_array_equal(pooled_NxF, expected_NxTxD.reshape(3, -1))


@pytest.mark.parametrize("pooling", ["mean", "concatenate"])
def test_what_stands_after_the_end_changes_nothing(pooling):
    inside_NxTx1 = (np.arange(4) < LENGTHS_N[:, None])[..., None]
    other_NxTxD = np.where(inside_NxTx1, FEATURES_NxTxD, np.float32(1e6))
    np.testing.assert_array_equal(
        pool(FEATURES_NxTxD, LENGTHS_N, pooling), pool(other_NxTxD, LENGTHS_N, pooling)
    )
