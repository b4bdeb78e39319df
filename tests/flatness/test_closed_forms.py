"""Linear, logistic and softmax regression, whose curvature is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat import flatness

KEY = jax.random.key(8)
RNG = np.random.default_rng(0)
M, B, D, V = 3, 10, 4, 3
BATCHES = {
    "x": RNG.normal(size=(M, B, D)),
    "y": RNG.normal(size=(M, B)),
    "labels": RNG.integers(0, V, size=(M, B)),
    "weights": RNG.choice([0.0, 0.5, 1.0], size=(M, B)),
}
X_NxD = BATCHES["x"].reshape(-1, D)
WEIGHTS_N = BATCHES["weights"].ravel() / BATCHES["weights"].sum()


def squared_loss(params_D, batch):
    errors_B = batch["x"] @ params_D - batch["y"]
    return jnp.sum(batch["weights"] * errors_B**2), batch["weights"].sum()


def assert_within(estimate, truth, num_sems=4):
    assert abs(estimate.mean - truth) < num_sems * estimate.sem


def test_linear_regression():
    """H = 2 X'X / n for any parameters and targets."""
    args, hessian_DxD = (squared_loss, np.ones(D), BATCHES, KEY), 2 * (X_NxD.T * WEIGHTS_N) @ X_NxD
    trace = flatness.hessian_trace(*args, num_probes=4000, over="probes", probes_per_pass=4000)
    assert_within(trace, np.trace(hessian_DxD))
    # Hutchinson, 1990: signs leave the variance of the entries off the diagonal.
    off_diagonal = np.sum(hessian_DxD**2) - np.sum(np.diag(hessian_DxD) ** 2)
    np.testing.assert_allclose(trace.sem, np.sqrt(2 * off_diagonal / 4000), rtol=0.05)
    extremes = flatness.hessian_extremes(*args, num_largest=2, num_smallest=2, num_steps=D)
    found_D = np.concatenate([extremes.smallest.values_k, extremes.largest.values_k[::-1]])
    np.testing.assert_allclose(found_D, np.linalg.eigvalsh(hessian_DxD), rtol=1e-10)


def test_average_sharpness_of_linear_regression_is_half_the_trace_at_any_sigma():
    args, trace = (squared_loss, np.ones(D), BATCHES, KEY), 2 * WEIGHTS_N @ np.sum(X_NxD**2, axis=1)
    how = {"num_probes": 4000, "over": "probes", "probes_per_pass": 4000}
    small, large = (flatness.average_sharpness(*args, sigma=s, **how) for s in (0.01, 30.0))
    np.testing.assert_allclose(small.mean / 0.01**2, large.mean / 30.0**2, rtol=1e-8)
    assert_within(large, 30.0**2 / 2 * trace)
    assert large.sem < 0.02 * large.mean


def test_gradient_noise_of_linear_regression():
    """x ~ N(0, C), y = x'(theta - d) + s e: the gradient of a prediction is 2 x (x'd - s e).

    So E g = 2 C d, H = 2 C and, by Isserlis, Sigma = 4 ((s^2 + d'Cd) C + C d d'C).
    """
    root_DxD, d_D, s = RNG.normal(size=(D, D)), np.asarray([0.5, -0.3, 0.0, 0.2]), 0.7
    x = RNG.normal(size=(3000, B, D)) @ root_DxD
    y = x @ (np.ones(D) - d_D) + s * RNG.normal(size=(3000, B))
    batches = {"x": x, "y": y, "weights": np.ones((3000, B))}
    found = flatness.gradient_noise(squared_loss, np.ones(D), batches)
    c_DxD = root_DxD.T @ root_DxD
    sigma_DxD = 4 * ((s**2 + d_D @ c_DxD @ d_D) * c_DxD + np.outer(c_DxD @ d_D, c_DxD @ d_D))
    squared = 4 * d_D @ c_DxD @ c_DxD @ d_D
    for estimate, truth in (
        (found.covariance_trace, np.trace(sigma_DxD)),
        (found.squared_gradient, squared),
        (found.noise_scale, np.trace(sigma_DxD) / squared),
        (found.alignment, 2 * np.trace(sigma_DxD @ c_DxD)),
    ):
        assert_within(estimate, truth)
        assert estimate.sem < 0.1 * truth


def logistic_log_probs(params_D, batch):
    """Two classes; the logit of the first is 0."""
    logits_B = batch["x"] @ params_D
    return jax.nn.log_softmax(jnp.stack([0 * logits_B, logits_B], axis=-1)), batch["weights"]


def softmax_log_probs(params_DxV, batch):
    return jax.nn.log_softmax(batch["x"] @ params_DxV), batch["weights"]


def probs_of(logits):
    odds = np.exp(logits)
    return odds / odds.sum(axis=-1, keepdims=True)


def logistic():
    """H = sum_n w_n p (1 - p) x x'."""
    params_D = RNG.normal(size=D)
    p_N = probs_of(np.stack([0 * X_NxD[:, 0], X_NxD @ params_D], axis=-1))[:, 1]
    return logistic_log_probs, params_D, (X_NxD.T * (WEIGHTS_N * p_N * (1 - p_N))) @ X_NxD


def softmax():
    """H = sum_n w_n x x' kron (diag p - p p')."""
    params_DxV = RNG.normal(size=(D, V))
    hessian = 0
    for weight, x_D, p_V in zip(WEIGHTS_N, X_NxD, probs_of(X_NxD @ params_DxV), strict=True):
        hessian += weight * np.kron(np.outer(x_D, x_D), np.diag(p_V) - np.outer(p_V, p_V))
    return softmax_log_probs, params_DxV, hessian


@pytest.mark.parametrize("problem", [logistic, softmax])
@pytest.mark.slow
def test_classification(problem):
    """Logits are linear in the parameters, so H = G = F for any labels."""
    log_probs_fn, params, dense_PxP = problem()

    def loss_fn(params, batch):
        log_probs_BxV, weights_B = log_probs_fn(params, batch)
        labels_B = jnp.minimum(batch["labels"], log_probs_BxV.shape[-1] - 1)
        chosen_B = jnp.take_along_axis(log_probs_BxV, labels_B[:, None], axis=1)[:, 0]
        return -jnp.sum(weights_B * chosen_B), weights_B.sum()

    product = jax.vmap(lambda v: flatness.hessian_vector_product(loss_fn, params, BATCHES, v))
    columns_PxP = product(np.eye(params.size).reshape(-1, *params.shape))
    np.testing.assert_allclose(columns_PxP.reshape(dense_PxP.shape), dense_PxP, atol=1e-12)
    args, how = (params, BATCHES, KEY), {"over": "probes"}
    h = flatness.hessian_trace(loss_fn, *args, num_probes=500, probes_per_pass=500, **how)
    g = flatness.gauss_newton_trace(log_probs_fn, *args, num_probes=500, probes_per_pass=500, **how)
    f = flatness.fisher_trace(log_probs_fn, *args, num_samples=500, samples_per_pass=500, **how)
    np.testing.assert_allclose([g.mean, g.sem], [h.mean, h.sem], rtol=1e-10)  # the same probes
    for trace in (h, f):
        assert_within(trace, np.trace(dense_PxP))
        assert trace.sem < 0.1 * trace.mean
