"""Extreme eigenvalues and spectral densities against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import spectrum
from tests.support import softmax_table
from tests.support import tiny_masked_lm as lm

KEY = jax.random.key(4)


def dense(matrix: str, problem, params, batches) -> np.ndarray:
    make = problem.dense_hessian if matrix == "hessian" else problem.dense_gauss_newton
    return np.asarray(make(params, batches))


def extremes(matrix: str, problem, params, batches, **options):
    if matrix == "hessian":
        return spectrum.hessian_extremes(problem.loss_fn, params, batches, KEY, **options)
    return spectrum.gauss_newton_extremes(problem.log_probs_fn, params, batches, KEY, **options)


PROBLEMS = [softmax_table, pytest.param(lm, marks=pytest.mark.slow)]


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.slow
def test_extreme_eigenpairs_equal_the_dense_ones(problem, matrix):
    params, batches = problem.make_params(), problem.make_batches(3, 4)
    matrix_PxP = dense(matrix, problem, params, batches)
    values_P = np.linalg.eigvalsh(matrix_PxP)
    options = {"num_largest": 5, "num_smallest": 2, "num_steps": 80}
    found = extremes(matrix, problem, params, batches, **options)
    np.testing.assert_allclose(found.largest.values_k, values_P[::-1][:5], rtol=1e-8)
    if matrix == "hessian":
        assert values_P[0] < -1e-3
        np.testing.assert_allclose(found.smallest.values_k, values_P[:2], rtol=1e-8)
    for k in range(5):
        vector_P = ravel_pytree(jax.tree.map(lambda x, k=k: x[k], found.largest.vectors))[0]
        np.testing.assert_allclose(jnp.linalg.norm(vector_P), 1, rtol=1e-10)
        residual = np.linalg.norm(matrix_PxP @ vector_P - found.largest.values_k[k] * vector_P)
        assert residual < 1e-6


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.slow
def test_residuals_are_those_of_the_pairs_and_bound_the_error(problem):
    """After far too few steps the residual is still exact and still bounds the error."""
    params, batches = problem.make_params(), problem.make_batches(3, 4)
    hessian_PxP = dense("hessian", problem, params, batches)
    values_P = np.linalg.eigvalsh(hessian_PxP)
    options = {"num_largest": 3, "num_smallest": 1, "num_steps": 6}
    found = extremes("hessian", problem, params, batches, **options)
    assert found.largest.residuals_k.max() > 0.001
    for pairs in found:
        for k, value in enumerate(np.asarray(pairs.values_k)):
            vector_P = ravel_pytree(jax.tree.map(lambda x, k=k: x[k], pairs.vectors))[0]
            residual = np.linalg.norm(hessian_PxP @ vector_P - value * vector_P)
            np.testing.assert_allclose(pairs.residuals_k[k], residual, rtol=1e-6)
            assert np.abs(values_P - value).min() <= residual


def test_a_basis_that_is_complete_early_gives_every_eigenvalue_once():
    """Rank three of twelve: the basis is complete after the fourth step."""
    scales = jnp.asarray([3.0, -2.0, 1.0, *[0.0] * 9])

    def loss_fn(params, batch):
        return batch * jnp.sum(scales * params**2) / 2, jnp.asarray(1.0)

    options = {"num_largest": 2, "num_smallest": 2, "num_steps": 12}
    args = loss_fn, jnp.ones(12), jnp.ones(1), KEY
    found = spectrum.hessian_extremes(*args, **options)
    np.testing.assert_allclose(found.largest.values_k, [3, 1], atol=1e-8)
    np.testing.assert_allclose(found.smallest.values_k, [-2, 0], atol=1e-8)
    more = spectrum.hessian_extremes(*args, **(options | {"num_largest": 6}))
    np.testing.assert_allclose(more.largest.values_k, [3, 1, 0, -2, np.nan, np.nan], atol=1e-8)
    np.testing.assert_allclose(more.largest.residuals_k, [0] * 4 + [np.nan] * 2, atol=1e-8)
    with pytest.raises(ValueError, match="and parameters, not 3"):
        spectrum.hessian_extremes(*args, **(options | {"num_steps": 3}))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_density_moments_are_those_of_the_dense_matrix(problem):
    params, batches = problem.make_params(), problem.make_batches(3, 4)
    hessian_PxP = dense("hessian", problem, params, batches)
    values_P = np.linalg.eigvalsh(hessian_PxP)
    density = spectrum.hessian_density(
        problem.loss_fn, params, batches, KEY, num_probes=200, num_steps=12
    )
    np.testing.assert_allclose(density.weights_nxm.sum(axis=1), 1, rtol=1e-10)
    for power in (1, 2, 3, 4):
        estimate = density.mean_of(lambda x, power=power: x**power)
        truth = (values_P**power).mean()
        assert abs(estimate.mean - truth) < 3 * estimate.sem
        assert estimate.sem < 0.2 * (np.abs(values_P) ** power).mean()
    rank, truth = density.effective_rank(), values_P.sum() ** 2 / (values_P**2).sum()
    assert abs(rank.mean - truth) < 3 * rank.sem


def test_each_draw_is_the_quadratic_form_of_its_probe():
    """v' M^k v exactly, for every power that m steps determine."""
    scales = jnp.asarray([3.0, -2.0, 1.0, 0.5, 0.1, -0.3])

    def loss_fn(params, batch):
        mixed = jnp.cos(jnp.outer(jnp.arange(6.0), jnp.arange(6.0))) @ params
        return batch * jnp.sum(scales * mixed**2) / 2, jnp.asarray(1.0)

    hessian = np.asarray(jax.jit(jax.hessian(lambda p: loss_fn(p, 1.0)[0]))(jnp.ones(6)))
    density = spectrum.hessian_density(
        loss_fn, jnp.ones(6), jnp.ones(1), KEY, num_probes=5, num_steps=3
    )
    probes_5xP = jax.vmap(lambda key: spectrum.rademacher_like(key, jnp.ones(6)))(
        jax.random.split(KEY, 5)
    )
    for power in range(6):
        power_PxP = np.linalg.matrix_power(hessian, power)
        forms_5 = jnp.einsum("ni,ij,nj->n", probes_5xP, power_PxP, probes_5xP) / 6
        moments_5 = (density.weights_nxm * density.nodes_nxm**power).sum(axis=1)
        np.testing.assert_allclose(moments_5, forms_5, rtol=1e-8)
        found = density.mean_of(lambda x, power=power: x**power)
        np.testing.assert_allclose(found.mean, forms_5.mean(), rtol=1e-8)
        sem = np.std(forms_5, ddof=1) / 5**0.5
        np.testing.assert_allclose(found.sem, sem, rtol=1e-6, atol=1e-12)
