"""Gradient noise against the explicit covariance of single gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import gradient_noise
from tests.support import softmax_table as table


@jax.jit
def truth(params, pool):
    """tr Sigma, |E g|^2 and tr(Sigma H) of a pool, which is the population here."""
    flat_P, unravel = ravel_pytree(params)

    def losses_N(flat_P):
        log_probs_NxV, _ = table.log_probs_fn(unravel(flat_P), pool)
        return -jnp.take_along_axis(log_probs_NxV, pool["targets"][:, None], axis=1)[:, 0]

    gradients_NxP = jax.jacrev(losses_N)(flat_P)
    mean_P = gradients_NxP.mean(axis=0)
    sigma_PxP = jnp.cov(gradients_NxP.T, bias=True)
    hessian_PxP = jax.hessian(lambda flat_P: losses_N(flat_P).mean())(flat_P)
    return jnp.trace(sigma_PxP), mean_P @ mean_P, jnp.trace(sigma_PxP @ hessian_PxP)


@pytest.fixture(scope="module")
def problem():
    params, pool = table.make_params(), table.make_batches(1, 64)
    pool = jax.tree.map(lambda x: x[0], pool)
    return params, pool | {"weights": jnp.ones(64)}


@pytest.mark.slow
def test_unbiased_and_covered(problem):
    """Means over a thousand samples of the pool, and the coverage of 95% intervals.

    Microbatches have 4 or 5 predictions: the fifth one's weight is 0 in every other of them.
    """
    params, pool = problem
    weights_MxB = jnp.ones((96, 5)).at[::2, 4].set(0)

    @jax.jit
    def estimate(key):
        rows_MxB = jax.random.randint(key, (96, 5), 0, 64)
        batches = jax.tree.map(lambda x: x[rows_MxB], pool) | {"weights": weights_MxB}
        return gradient_noise(table.loss_fn, params, batches)

    keys = jax.random.split(jax.random.key(0), 1000)
    found = jax.lax.map(estimate, keys, batch_size=50)
    names = "covariance_trace", "squared_gradient", "alignment"
    for name, value in zip(names, truth(params, pool), strict=True):
        estimates = getattr(found, name)
        means_S = np.asarray(estimates.mean)
        z = (means_S.mean() - value) / (means_S.std(ddof=1) / len(means_S) ** 0.5)
        low, high = estimates.interval()
        coverage = float(jnp.mean((low < value) & (value < high)))
        print(name, float(value), f"z {z:.2f}, coverage {coverage:.3f}")
        assert abs(z) < 3.5
        assert 0.92 < coverage < 0.98


@pytest.mark.slow
def test_the_noise_scale_is_the_ratio(problem):
    params, pool = problem
    rows_MxB = jax.random.randint(jax.random.key(1), (3000, 16), 0, 64)
    batches = jax.tree.map(lambda x: x[rows_MxB], pool)
    found = gradient_noise(table.loss_fn, params, batches)
    trace, squared, _ = truth(params, pool)
    assert abs(found.noise_scale.mean - trace / squared) < 3 * found.noise_scale.sem
    assert found.noise_scale.sem < 0.1 * trace / squared


@pytest.mark.slow
def test_noise_equals_curvature_where_the_model_is_optimal(problem):
    """Bartlett: with labels drawn from the model, Sigma = H = G, so tr(Sigma H) = tr H^2."""
    params, pool = problem
    log_probs_NxV, _ = table.log_probs_fn(params, pool)
    rows_MxB = jax.random.randint(jax.random.key(2), (1500, 32), 0, 64)
    labels_MxB = jax.random.categorical(jax.random.key(3), log_probs_NxV[rows_MxB])
    batches = jax.tree.map(lambda x: x[rows_MxB], pool) | {"targets": labels_MxB}
    found = gradient_noise(table.loss_fn, params, batches)
    whole = jax.tree.map(lambda x: x[None], pool)
    fisher_PxP = table.dense_gauss_newton(params, whole)
    for estimate, value in (
        (found.covariance_trace, jnp.trace(fisher_PxP)),
        (found.alignment, jnp.trace(fisher_PxP @ fisher_PxP)),
    ):
        assert abs(estimate.mean - value) < 3 * estimate.sem
        assert estimate.sem < 0.05 * value
    assert abs(found.squared_gradient.mean) < 3 * found.squared_gradient.sem


def test_few_microbatches_are_an_error(problem):
    params, _ = problem
    with pytest.raises(ValueError, match="at least 6 microbatches"):
        gradient_noise(table.loss_fn, params, table.make_batches(5, 4))
