"""Slices through losses with known closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.flatness import filter_normalized, loss_barrier, loss_rises
from tests.support import softmax_table as table
from tests.support import tiny_masked_lm as lm

CURVATURE_P = np.asarray([4.0, 1.0, 0.5])
WEIGHTS_M = np.asarray([1.0, 2.0, 5.0])


def quadratic(params, batch):
    """The mean of params' A params / 2 over microbatches of 1, 2 and 5 predictions."""
    return batch * jnp.sum(CURVATURE_P * params**2) / 2, batch


def double_well(params, batch):
    return batch * jnp.sum((params**2 - 1) ** 2), batch


def test_a_plane_through_a_quadratic():
    params, directions = np.asarray([1.0, -2.0, 0.0]), list(np.eye(3)[[0, 2]])
    steps_GxD = np.asarray([[0.0, 0.0], [1.0, 0.0], [-0.5, 2.0], [0.0, -3.0]])
    found = loss_rises(quadratic, params, WEIGHTS_M, directions, steps_GxD)
    points_GxP = params + steps_GxD @ np.stack(directions)
    expected_G = (points_GxP**2 - params**2) @ CURVATURE_P / 2
    np.testing.assert_allclose(found.mean, expected_G, atol=1e-12)
    np.testing.assert_allclose(found.sem, 0, atol=1e-12)


@pytest.mark.slow
def test_errors_are_those_of_paired_differences():
    """If all sentences rise equally the error is 0, even if their losses differ."""

    def loss_fn(params, batch):
        return jnp.sum(params) + batch, jnp.asarray(1.0)

    args = loss_fn, np.zeros(2), np.asarray([0.0, 100.0, -30.0]), [np.ones(2)]
    found = loss_rises(*args, np.asarray([[0.5]]))
    np.testing.assert_allclose([found.mean[0], found.sem[0]], [1, 0], atol=1e-12)
    batches = table.make_batches(9, 6)
    params = table.make_params()
    direction = jax.tree.map(jnp.ones_like, params) | {"bias": jnp.arange(5.0)}
    found = loss_rises(table.loss_fn, params, batches, [direction], np.asarray([[0.7]]))
    moved = jax.tree.map(lambda p, d: p + 0.7 * d, params, direction)
    sums_M, weights_M = jax.vmap(lambda b: table.loss_fn(moved, b))(batches)
    sums_M -= jax.vmap(lambda b: table.loss_fn(params, b)[0])(batches)
    rise = sums_M.sum() / weights_M.sum()
    sem = np.sqrt(9 / 8 * np.sum((sums_M - rise * weights_M) ** 2)) / weights_M.sum()
    np.testing.assert_allclose([found.mean[0], found.sem[0]], [rise, sem], rtol=1e-10)
    assert found.num_samples == 9


def test_barriers():
    ends = np.asarray([-1.0]), np.asarray([1.0])
    t_G = np.linspace(0, 1, 5)
    found = loss_barrier(double_well, *ends, WEIGHTS_M, num_points=5)
    np.testing.assert_allclose(found.mean, ((2 * t_G - 1) ** 2 - 1) ** 2, atol=1e-12)
    ends = np.asarray([1.0, 0.0, 0.0]), np.asarray([3.0, 0.0, 0.0])
    found = loss_barrier(quadratic, *ends, WEIGHTS_M, num_points=5)
    np.testing.assert_allclose(found.mean, -4 * 4 * t_G * (1 - t_G) / 2, atol=1e-12)


def test_filters_are_as_long_as_those_of_the_parameters():
    """The weights of one unit are a column; a stack holds two layers; a vector is one filter."""
    shapes = {"kernel": (3, 4), "stack/kernel": (2, 3, 5), "bias": (6,), "stack/bias": (2, 3)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    is_stacked = lm.is_stacked
    direction = filter_normalized(jax.random.key(0), params, is_stacked)
    for name, leaf in params.items():
        found, axis = np.asarray(direction[name]), 1 if is_stacked(name) else 0
        norms = (np.linalg.norm(x, axis=axis) for x in (found, leaf))
        np.testing.assert_allclose(*norms, rtol=1e-12)
        assert np.abs(found - leaf).max() > 0.1
