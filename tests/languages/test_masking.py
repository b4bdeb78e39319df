"""Which words are masked."""

import jax
import numpy as np
from scipy.stats import chisquare

from jaxflat.languages.masking import mask_each, mask_one

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
