"""Curvatures that training differentiates: values and gradients, against dense float64 matrices."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import penalty
from jaxflat.flatness.sampling import normal_like, rademacher_like
from jaxflat.flatness.trees import inner
from tests.support import tiny_masked_lm as lm
from tests.support.counts import FULL

NUM_KEYS = 2000 if FULL else 200


def loss_and_log_probs(params, batch):
    return lm.loss_fn(params, batch), lm.log_probs_fn(params, batch)


def features(params, batch):
    """Of every token, by positions; padding has weight 0."""
    _, outputs = lm.MODEL.apply({"params": params}, batch["tokens"], batch["lengths"])
    words = jnp.arange(lm.T)[None] < batch["lengths"][:, None]
    return outputs["features_BxMxD"], words.astype(float)


CURVATURES = {
    "gauss_newton": partial(penalty.gauss_newton_curvature, loss_and_log_probs),
    "hessian": partial(penalty.hessian_curvature, lm.loss_fn),
    "norm": partial(penalty.squared_norm, lm.loss_fn),
    "rank": partial(penalty.feature_rank, lm.loss_fn, features),
}


@pytest.fixture(scope="module")
def problem():
    params, batches = lm.make_params(), lm.make_batches(1, 4)
    batch = lm.merge(batches)
    vectors = tuple(rademacher_like(jax.random.key(i), params) for i in (1, 2))
    dense = {"hessian": lm.dense_hessian, "gauss_newton": lm.dense_gauss_newton}
    matrices = {name: matrix(params, batches) for name, matrix in dense.items()}
    return SimpleNamespace(params=params, batches=batches, batch=batch, vectors=vectors, **matrices)


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVATURES)
def test_values_are_the_loss_and_the_dense_mean_over_vectors(problem, name):
    found = jax.jit(CURVATURES[name])(problem.params, problem.batch, problem.vectors)
    flat = [ravel_pytree(vector)[0] for vector in problem.vectors]
    if name == "norm":
        expected = (ravel_pytree(problem.params)[0] ** 2).sum()
    elif name == "rank":
        found_BxTxD, words_BxT = features(problem.params, problem.batch)
        assert 0 < words_BxT.mean() < 1
        eigenvalues = np.linalg.eigvalsh(np.cov(found_BxTxD[words_BxT == 1], rowvar=False))
        expected = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    else:
        expected = sum(v @ getattr(problem, name) @ v for v in flat) / 2
    np.testing.assert_allclose(found[2], expected, rtol=1e-9)
    np.testing.assert_allclose(found[:2], lm.loss_fn(problem.params, problem.batch), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVATURES)
def test_gradients_are_central_finite_differences(problem, name):
    curvature = jax.jit(lambda p: CURVATURES[name](p, problem.batch, problem.vectors)[2])
    direction = normal_like(jax.random.key(3), problem.params)
    slope = inner(jax.jit(jax.grad(curvature))(problem.params), direction)

    def at(step):
        return curvature(jax.tree.map(lambda p, d: p + step * d, problem.params, direction))

    step = 1e-4  # fourth order: two central differences, whose errors of second order cancel
    coarse, fine = ((at(h) - at(-h)) / (2 * h) for h in (step, step / 2))
    np.testing.assert_allclose(slope, (4 * fine - coarse) / 3, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gauss_newton", "hessian"])
def test_value_and_gradient_are_unbiased_for_the_trace(problem, name):
    params, batch = problem.params, problem.batch
    dense = {"hessian": lm.dense_hessian, "gauss_newton": lm.dense_gauss_newton}[name]
    exact = jax.jit(jax.value_and_grad(lambda p: jnp.trace(dense(p, problem.batches))))(params)
    direction = normal_like(jax.random.key(4), params)

    def numbers(value, gradient):
        """The value, and each leaf's product with a fixed random direction."""
        products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
        return jnp.stack([value, *jax.tree.leaves(products)])

    def draw(key):
        def estimate(p):
            vectors = penalty.random_signs(1, None, p, batch, key)
            return CURVATURES[name](p, batch, vectors)[2]

        return numbers(*jax.value_and_grad(estimate)(params))

    keys = jax.random.split(jax.random.key(5), NUM_KEYS)
    draws = np.asarray(jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=20))(keys))
    sems = draws.std(0, ddof=1) / np.sqrt(NUM_KEYS)
    expected, varies = np.asarray(numbers(*exact)), sems > 1e-12
    z = (draws.mean(0) - expected)[varies] / sems[varies]
    assert varies.sum() > len(expected) / 2
    assert np.abs(z).max() < 4, z
    np.testing.assert_allclose(draws.mean(0)[~varies], expected[~varies], atol=1e-9)


@pytest.mark.parametrize("variances", [(1, 1, 1), (3, 0, 0), (4, 2, 1), (1, 1e-12, 0)])
def test_the_effective_rank_of_a_known_covariance(variances):
    """Rows +-sqrt(variance) on each axis, rotated and moved, in any unit, and padding far off."""
    rotation = jax.random.orthogonal(jax.random.key(6), 3)
    rows = jnp.diag(jnp.sqrt(jnp.array(variances, float))) @ rotation
    padding = jnp.full((1, 3), 1e3)
    tokens = jnp.concatenate([rows, -rows, padding - 5.0]) + 5.0
    weights = jnp.array([1.0] * 6 + [0.0])
    expected = sum(variances) ** 2 / sum(v**2 for v in variances)
    for scale in (1, 1e-6, 1e6):
        value, gradient = jax.value_and_grad(penalty.effective_rank)(scale * tokens, weights)
        np.testing.assert_allclose(value, expected, rtol=1e-7)
        assert jnp.isfinite(gradient).all()
        assert not gradient[-1].any()


@pytest.mark.slow
def test_power_steps_on_a_frozen_model_end_at_the_top_eigenvector(problem):
    step = jax.jit(partial(penalty.power_step, lm.loss_fn))
    values, columns = jnp.linalg.eigh(problem.hessian)
    largest = jnp.argmax(jnp.abs(values))
    vectors = penalty.first_vector(problem.params)
    for _ in range(400):
        vectors = step(vectors, problem.params, problem.batch, jax.random.key(0))
    cosine = ravel_pytree(vectors)[0] @ columns[:, largest]
    np.testing.assert_allclose(abs(cosine), 1, atol=1e-6)
    _, _, value = CURVATURES["hessian"](problem.params, problem.batch, vectors)
    np.testing.assert_allclose(value, values[largest], rtol=1e-8)


def test_random_signs_follow_from_the_key_alone():
    params = {"a": jnp.zeros((20, 2)), "b": jnp.zeros(3)}
    other = jax.tree.map(jnp.ones_like, params)
    one, two = (penalty.random_signs(2, None, p, None, jax.random.key(6)) for p in (params, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    flat = [ravel_pytree(vector)[0] for vector in one]
    assert all(np.abs(v).max() == np.abs(v).min() == 1 for v in flat)
    assert not np.array_equal(*flat)
