"""The gradient of a batch by shards and microbatches: that of the whole batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.languages.batches import Batch, OneHot, interleave_by_length
from jaxflat.training.gradient import Division, loss_and_gradient, sum_over_microbatches
from jaxflat.training.objectives import masked_lm_loss

BATCH = {
    "rows": np.random.default_rng(0).normal(size=(24, 3)),
    "weights": np.random.default_rng(1).integers(0, 3, 24).astype(float),
}


def loss_fn(params, batch):
    """A quartic, with weights that differ between microbatches."""
    losses_B = (batch["rows"] @ params) ** 4
    return (losses_B * batch["weights"]).sum(), batch["weights"].sum()


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("num_microbatches", [1, 3, 12])
def test_the_parts_of_a_batch_have_the_gradient_of_the_whole(num_shards, num_microbatches):
    """Against the closed form 4 (x' theta)^3 x, weighted over all rows."""
    with jax.enable_x64(True):
        params = jnp.array([0.3, -1.0, 0.7])
        batch = jax.tree.map(jnp.asarray, BATCH)
        loss, gradient = loss_and_gradient(
            loss_fn, batch, params, Division(num_shards, num_microbatches)
        )
        outputs_B, shares_B = BATCH["rows"] @ params, BATCH["weights"] / BATCH["weights"].sum()
        np.testing.assert_allclose(loss, shares_B @ outputs_B**4, rtol=1e-13)
        expected = (shares_B * 4 * outputs_B**3) @ BATCH["rows"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_every_example_is_in_one_microbatch():
    in_three = Division(num_microbatches=3)
    totals = sum_over_microbatches(lambda x: (x.sum(), 2.0 ** -x[0]), jnp.arange(6.0), in_three)
    assert totals == (15, 2.0**0 + 2.0**-1 + 2.0**-2)  # parts start with the examples 0, 1, 2


SENTENCES = np.random.default_rng(2).permutation([2, 3, 3, 4, 4, 5, 8, 9, 10, 10, 11, 12])
"""The lengths of twelve sentences, sorted into four microbatches of three."""


def batch_of_lengths(lengths_B: np.ndarray) -> Batch:
    """Word t of sentence b is 100 b + t, and padding is nan."""
    b_Bx1, t_1xT = np.arange(12.0)[:, None], np.arange(12.0)[None]
    inputs_BxT = np.where(t_1xT < lengths_B[:, None], 100 * b_Bx1 + t_1xT, np.nan)
    others = (jnp.asarray(b_Bx1),) * 3
    return Batch(jnp.asarray(inputs_BxT), jnp.asarray(lengths_B), *others)


@pytest.mark.parametrize("lengths", [(), (12,), (4, 8, 12), (3, 6, 9, 12)])
def test_microbatches_of_similar_lengths_keep_all_words_and_little_padding(lengths):
    def words_and_positions(batch):
        return jnp.nansum(batch.inputs_BxT), jnp.asarray(batch.inputs_BxT.size)

    whole = batch_of_lengths(SENTENCES)
    sorted_batch = interleave_by_length(whole, 4)
    words, positions = jax.jit(
        partial(sum_over_microbatches, words_and_positions, division=Division(1, 4, lengths))
    )(sorted_batch)
    assert words == np.nansum(whole.inputs_BxT)
    padded = lengths or (12,)
    longest = np.sort(SENTENCES).reshape(4, 3).max(1)
    assert positions == 3 * sum(
        min(n for n in padded if n >= longest_one) for longest_one in longest
    )


def test_sentences_sorted_by_length_keep_their_targets():
    batch = interleave_by_length(batch_of_lengths(SENTENCES), 4)
    assert sorted(batch.positions_BxM[:, 0].tolist()) == list(range(12))
    np.testing.assert_array_equal(batch.inputs_BxT[:, 0], 100 * batch.positions_BxM[:, 0])
    np.testing.assert_array_equal(batch.lengths_B, SENTENCES[batch.positions_BxM[:, 0].astype(int)])


def test_the_memory_of_one_hot_targets_is_that_of_one_microbatch():
    """Of 3000 words, 64 microbatches need at most a tenth more memory than 2."""
    num_words, length = 3000, 8

    def bytes_needed(num_microbatches):
        @jax.jit
        def step(params, words_BxT):
            lengths_B = jnp.full(len(words_BxT), length)
            weights_BxM = jnp.ones(words_BxT.shape)
            batch = Batch(
                words_BxT, lengths_B, words_BxT, OneHot(words_BxT, num_words), weights_BxM
            )
            apply_fn = lambda variables, words, *_: (variables["params"][words % 8], {})  # noqa: E731
            division = Division(num_microbatches=num_microbatches)
            return loss_and_gradient(masked_lm_loss(apply_fn), batch, params, division)

        words_BxT = jnp.zeros((2 * num_microbatches, length), jnp.int32)
        compiled = step.lower(jnp.zeros((8, num_words)), words_BxT).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_needed(64) < 1.1 * bytes_needed(2)
