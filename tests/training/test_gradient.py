"""The gradient of a batch by shards and microbatches: that of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.training.gradient import loss_and_gradient, sum_over_microbatches

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
        loss, gradient = loss_and_gradient(loss_fn, batch, params, num_shards, num_microbatches)
        outputs_B, shares_B = BATCH["rows"] @ params, BATCH["weights"] / BATCH["weights"].sum()
        np.testing.assert_allclose(loss, shares_B @ outputs_B**4, rtol=1e-13)
        expected = (shares_B * 4 * outputs_B**3) @ BATCH["rows"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_every_example_is_in_one_microbatch():
    totals = sum_over_microbatches(lambda x: (x.sum(), 2.0 ** -x[0]), jnp.arange(6.0), 3)
    assert totals == (15, 2.0**0 + 2.0**-1 + 2.0**-2)  # parts start with the examples 0, 1, 2
