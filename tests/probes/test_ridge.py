"""The ridge head against closed forms in numpy, and its extreme cases."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxflat.probes.ridge import unexplained_variance


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
