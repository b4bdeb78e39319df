"""Diagonals against dense matrices; their errors against samples computed one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import fisher_diagonal, hessian_diagonal, ratio_estimate
from jaxflat.flatness.sampling import draw_labels, draw_probe
from tests.support import softmax_table as table

DRAWS, KEYS = 2, jax.random.split(jax.random.key(0), 2000)


@pytest.fixture(scope="module")
def problem():
    """Five microbatches of unequal weight; the first has weight 0."""
    params, batches = table.make_params(), table.make_batches(5, 4)
    scales_5x1 = jnp.asarray([0.0, 1.0, 2.0, 1.0, 0.5])[:, None]
    return params, batches | {"weights": batches["weights"] * scales_5x1}


def hessian_samples(params, batches, key):
    """v * H v of each microbatch's dense Hessian, the mean over this microbatch's probes."""
    flat, unravel = ravel_pytree(params)

    def microbatch(index, batch):
        matrix_PxP = jax.hessian(lambda flat: table.loss_fn(unravel(flat), batch)[0])(flat)
        probes = [draw_probe(key, "probes+sentences", index, d, params) for d in range(DRAWS)]
        return sum(v * (matrix_PxP @ v) for v, _ in map(ravel_pytree, probes)) / DRAWS

    return jax.vmap(microbatch)(jnp.arange(5), batches)


def fisher_samples(params, batches, key):
    """Squared gradients of each microbatch at its drawn labels, the mean over draws."""
    flat, unravel = ravel_pytree(params)

    def microbatch(index, batch):
        log_probs_BxV, weights_B = table.log_probs_fn(params, batch)
        total = jnp.zeros_like(flat)
        for d in range(DRAWS):
            labels_B = draw_labels(jax.random.fold_in(key, d), log_probs_BxV, index * 4)

            def score(flat, labels_B=labels_B):
                log_probs_BxV = table.log_probs_fn(unravel(flat), batch)[0]
                chosen_B = jnp.take_along_axis(log_probs_BxV, labels_B[:, None], axis=1)[:, 0]
                return jnp.sum(jnp.sqrt(weights_B) * chosen_B)

            total += jax.grad(score)(flat) ** 2
        return total / DRAWS

    return jax.vmap(microbatch)(jnp.arange(5), batches)


@pytest.mark.parametrize(
    ("estimate", "samples_fn", "dense"),
    [
        (
            partial(hessian_diagonal, table.loss_fn, num_probes=DRAWS),
            hessian_samples,
            table.dense_hessian,
        ),
        (
            partial(fisher_diagonal, table.log_probs_fn, num_samples=DRAWS),
            fisher_samples,
            table.dense_gauss_newton,
        ),
    ],
    ids=["hessian", "fisher"],
)
@pytest.mark.slow
def test_unbiased_and_with_the_error_of_its_samples(problem, estimate, samples_fn, dense):
    params, batches = problem
    found = jax.jit(lambda keys: jax.lax.map(lambda k: estimate(params, batches, k), keys))(KEYS)
    assert (found.num_samples, found.over) == (5, "probes+sentences")
    means_SxP, sems_SxP = (
        jax.vmap(lambda x: ravel_pytree(x)[0])(x) for x in (found.mean, found.sem)
    )
    # Some entries are the same with every probe, but for rounding.
    errors_P = np.maximum(means_SxP.std(axis=0) / len(KEYS) ** 0.5, 1e-12)
    z_P = (means_SxP.mean(axis=0) - jnp.diag(dense(params, batches))) / errors_P
    print("largest z of", z_P.size, "entries:", np.abs(z_P).max())
    assert np.abs(z_P).max() < 4.5
    samples_MxP = jax.jit(samples_fn)(params, batches, KEYS[0])
    of_entry = jax.vmap(partial(ratio_estimate, over="sentences"), in_axes=(1, None))
    expected = of_entry(samples_MxP, batches["weights"].sum(axis=1))
    np.testing.assert_allclose(means_SxP[0], expected.mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(sems_SxP[0], expected.sem, rtol=0, atol=1e-10)
    assert (expected.sem > 1e-3).mean() > 0.5


@pytest.mark.parametrize(
    "estimate",
    [
        partial(hessian_diagonal, table.loss_fn, num_probes=2),
        partial(fisher_diagonal, table.log_probs_fn, num_samples=2),
    ],
)
def test_one_microbatch_has_no_error(estimate):
    with pytest.raises(ValueError, match="at least 2 microbatches"):
        estimate(table.make_params(), table.make_batches(1, 4), KEYS[0])
