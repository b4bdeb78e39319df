"""The ridge head against closed forms in numpy, and its extreme cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.probes import ridge
from jaxflat.probes.linear import LabelledFeatures, linear_probe_correct
from jaxflat.probes.ridge import Beliefs
from tests.support.traced_arrays import traced_arrays

unexplained_variance = jax.jit(ridge.unexplained_variance)
belief_errors = jax.jit(ridge.belief_errors)


def draw(seed: int, num_examples=40, num_features=5, num_tasks=2, num_classes=3):
    rng = np.random.default_rng(seed)
    features_NxF = rng.normal(size=(num_examples, num_features))
    labels_NxK = rng.integers(num_classes, size=(num_examples, num_tasks))
    targets_NxKxC = np.eye(num_classes)[labels_NxK]
    return features_NxF, targets_NxKxC


def by_least_squares(fit, held_out, l2):
    """Each task by an augmented least-squares problem, on its labelled sentences."""
    shares = []
    for k in range(fit[1].shape[1]):
        some, others = (targets[:, k].sum(1) > 0 for _, targets in (fit, held_out))
        x, y = fit[0][some], fit[1][some, k]
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        root = np.sqrt(l2 * (x**2).sum()) * np.eye(x.shape[1])
        kernel = np.linalg.lstsq(
            np.vstack([x, root]), np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None
        )[0]
        y = held_out[1][others, k] - mean_y
        errors = y - (held_out[0][others] - mean_x) @ kernel
        shares.append((errors**2).sum() / (y**2).sum())
    return np.mean(shares)


def test_equals_least_squares_where_tasks_miss_some_sentences():
    fit, held_out = draw(0), draw(1)
    fit[1][:15, 1] = held_out[1][30:, 0] = 0
    with jax.enable_x64(True):
        found = unexplained_variance(
            jax.tree.map(jnp.asarray, fit), jax.tree.map(jnp.asarray, held_out), 0.1
        )
    np.testing.assert_allclose(found, by_least_squares(fit, held_out, 0.1), rtol=1e-10)


def test_no_variance_is_left_if_the_features_are_the_labels():
    _, targets_NxKxC = draw(0)
    both = jnp.asarray(targets_NxKxC.reshape(40, -1)), jnp.asarray(targets_NxKxC)
    assert unexplained_variance(both, both, 1e-5) < 1e-3


def test_all_variance_is_left_if_the_features_are_independent():
    shares = [
        float(
            unexplained_variance(
                jax.tree.map(jnp.asarray, draw(2 * seed, 400)),
                jax.tree.map(jnp.asarray, draw(2 * seed + 1, 400)),
                1e-3,
            )
        )
        for seed in range(20)
    ]
    # Ordinary least squares leaves 1 + F / N of independent labels in expectation; the mean of the
    # labels adds another 1 / N.
    expected, error = 1 + 5 / 400, np.std(shares, ddof=1) / np.sqrt(20)
    assert abs(np.mean(shares) - expected) < 4 * error + 0.002


# With more features than examples, the dual form is used.


def test_more_features_than_examples_equal_least_squares():
    fit, held_out = draw(0, num_features=90), draw(1, num_features=90)
    fit[1][:15, 1] = held_out[1][30:, 0] = 0
    with jax.enable_x64(True):
        found = unexplained_variance(
            jax.tree.map(jnp.asarray, fit), jax.tree.map(jnp.asarray, held_out), 1e-3
        )
    np.testing.assert_allclose(found, by_least_squares(fit, held_out, 1e-3), rtol=1e-8)


def primal_share(features_NxF, targets_NxC, held_out):
    """The share of one task, by the normal equations."""
    x, y = (a - a.mean(0)[None] for a in (features_NxF, targets_NxC))
    gram = x.T @ x
    kernel = jnp.linalg.solve(gram + 1e-3 * jnp.trace(gram) * jnp.eye(len(gram)), x.T @ y)
    y = held_out[1] - targets_NxC.mean(0)[None]
    errors = y - (held_out[0] - features_NxF.mean(0)[None]) @ kernel
    return (errors**2).sum() / (y**2).sum()


@pytest.mark.slow
def test_more_features_than_examples_have_the_gradient_of_the_normal_equations():
    with jax.enable_x64(True):
        (x, y), held_out = (
            jax.tree.map(jnp.asarray, draw(seed, 20, num_features=50, num_tasks=1))
            for seed in (2, 3)
        )
        found = jax.grad(lambda x: unexplained_variance((x, y), held_out, 1e-3))(x)
        expected = jax.grad(primal_share)(x, y[:, 0], (held_out[0], held_out[1][:, 0]))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


def test_beliefs_of_more_features_than_examples_equal_the_normal_equations():
    rng = np.random.default_rng(4)
    x, p = rng.normal(size=(30, 70)), rng.dirichlet(np.ones(3), size=30)
    valid = np.arange(30) % 4 > 0
    with jax.enable_x64(True):
        data = Beliefs(*map(jnp.asarray, (x, p, valid)))
        found, _ = belief_errors(data, data, data, jnp.asarray([1e-4]))
    centred = x[valid] - x[valid].mean(0)
    gram = centred.T @ centred
    right = centred.T @ (p[valid] - p[valid].mean(0))
    kernel = np.linalg.solve(gram + 1e-4 * np.trace(gram) * np.eye(70), right)
    errors = p[valid] - p[valid].mean(0) - centred @ kernel
    np.testing.assert_allclose(np.asarray(found)[valid], (errors**2).sum(1), rtol=1e-8)


F, N, C, K, L = 49_152, 1000, 50, 2, 4  # width 1,536 at 32 positions


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def examples() -> tuple[jax.ShapeDtypeStruct, ...]:
    return array(N, F), array(N, K, C)


def beliefs() -> Beliefs:
    return Beliefs(array(N, F), array(N, C), array(N, dtype=jnp.bool))


def labelled() -> LabelledFeatures:
    return LabelledFeatures(array(N, F), array(K, N, dtype=jnp.int32), array(K, N, dtype=jnp.bool))


def linear(*parts) -> jax.Array:
    return linear_probe_correct(*parts, shots=N, num_classes=C, iterations=2)


FITS = {
    "adversary": (jax.grad(ridge.unexplained_variance), examples(), examples(), array()),
    "belief state": (ridge.belief_errors, *(beliefs() for _ in range(3)), array(L)),
    "linear probe": (linear, *(labelled() for _ in range(3)), array(L)),
}


@pytest.mark.parametrize("name", FITS)
def test_no_fit_makes_a_matrix_of_features_by_features(name):
    function, *arguments = FITS[name]
    sizes = [math.prod(array.shape) for array in traced_arrays(function, *arguments)]
    # A matrix of examples by features, or the kernels of all fits.
    assert N * F <= max(sizes) <= max(N * F, K * L * F * C) < F * F / 40
