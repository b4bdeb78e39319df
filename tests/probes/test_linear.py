"""The linear probe against scipy, and the data that it may use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from jaxflat.probes.linear import LabelledFeatures, fit_linear_probes, linear_probe_correct
from jaxflat.runs.probe_estimates import accuracy_estimate

C = 3


def problem(num_examples: int, num_features: int, seed: int = 0) -> LabelledFeatures:
    """Two label sets on correlated features, the second with some invalid sentences."""
    keys = jax.random.split(jax.random.key(seed), 4)
    mixing = jax.random.normal(keys[0], (num_features, num_features))
    features = 3 + jax.random.normal(keys[1], (num_examples, num_features)) @ mixing
    logits = jax.random.normal(keys[2], (2, num_features, C))
    noise = jax.random.gumbel(keys[3], (2, num_examples, C))
    labels = jnp.argmax(jnp.einsum("nf,kfc->knc", features, logits) / 4 + noise, axis=-1)
    valid = jnp.stack([jnp.ones(num_examples, bool), jnp.arange(num_examples) % 5 > 0])
    return LabelledFeatures(features, labels, valid)


def objective(features, labels, valid, l2, kernel, bias) -> float:
    """The stated objective, in numpy: centred features of mean squared norm 1."""
    centred = features - features.mean(0)
    scale = np.sqrt((centred**2).sum(1).mean())
    mean = features.mean(0)
    log_probs = log_softmax(features @ kernel + bias, axis=1)
    loss = -log_probs[np.arange(len(labels)), labels][valid].mean()
    del mean
    return loss + l2 / 2 * (scale * kernel).ravel() @ (scale * kernel).ravel()


def scipy_optimum(features, labels, valid, l2) -> float:
    centred = features - features.mean(0)
    inputs = centred / np.sqrt((centred**2).sum(1).mean())
    one_hot = np.eye(C)[labels]

    def loss_and_gradient(flat):
        kernel, bias = flat[:-C].reshape(-1, C), flat[-C:]
        log_probs = log_softmax(inputs @ kernel + bias, axis=1)
        loss = -(one_hot * log_probs).sum(1)[valid].mean() + l2 / 2 * (kernel**2).sum()
        residual = (np.exp(log_probs) - one_hot) * valid[:, None] / valid.sum()
        gradient = inputs.T @ residual + l2 * kernel
        return loss, np.concatenate([gradient.ravel(), residual.sum(0)])

    start = np.zeros((inputs.shape[1] + 1) * C)
    return minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B",
                    options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-9}).fun  # fmt: skip


@pytest.mark.parametrize("shape", [(300, 6), (30, 50)])
@pytest.mark.slow
def test_fits_reach_the_optimum_that_scipy_finds(shape):
    data = problem(*shape)
    penalties = np.array([1e-4, 1e-2, 1.0])
    kernels, biases = jax.jit(fit_linear_probes, static_argnames=("num_classes", "iterations"))(
        data, jnp.asarray(penalties, jnp.float32), num_classes=C, iterations=1000
    )
    arrays = [np.asarray(x, np.float64 if x.dtype == jnp.float32 else x.dtype)
              for x in (data.features_NxF, data.labels_KxN, data.valid_KxN)]  # fmt: skip
    for k in range(2):
        for place, l2 in enumerate(penalties):
            case = (arrays[0], arrays[1][k], arrays[2][k], l2)
            ours = objective(*case, np.float64(kernels[k, place]), np.float64(biases[k, place]))
            assert ours == pytest.approx(scipy_optimum(*case), abs=1e-4)


@pytest.mark.slow
def test_penalty_is_chosen_on_validation_and_test_labels_play_no_part():
    train, validation, test = problem(60, 10, 0), problem(400, 10, 0), problem(200, 10, 0)
    penalties = jnp.asarray([1e-6, 1e-1, 1e3])
    fit = jax.jit(linear_probe_correct, static_argnames=("shots", "num_classes", "iterations"))
    settings = {"shots": 60, "num_classes": C, "iterations": 200}
    correct = fit(train, validation, test, penalties, **settings)
    others = [fit(train, validation, test, penalties[i : i + 1], **settings) for i in range(3)]
    hits = [fit(train, validation, validation, penalties[i : i + 1], **settings) for i in range(3)]
    for k in range(2):
        valid = validation.valid_KxN[k]
        best = max(range(3), key=lambda i: (int((hits[i][k] & valid).sum()), i))
        np.testing.assert_array_equal(correct[k], others[best][k])
    relabelled = LabelledFeatures(test.features_NxF, (test.labels_KxN + 1) % C, test.valid_KxN)
    shifted = fit(train, validation, relabelled, penalties, **settings)
    assert not np.any(correct & shifted)


@pytest.mark.slow
def test_shots_are_the_first_training_sentences():
    data = problem(100, 8)
    first = LabelledFeatures(
        data.features_NxF[:40], data.labels_KxN[:, :40], data.valid_KxN[:, :40]
    )
    settings = {"num_classes": C, "iterations": 50}
    penalties = jnp.asarray([1e-3])
    np.testing.assert_array_equal(
        linear_probe_correct(data, data, data, penalties, shots=40, **settings),
        linear_probe_correct(first, data, data, penalties, shots=40, **settings),
    )


@pytest.mark.slow
def test_accuracy_error_covers_draws_and_sentences():
    """Probes of random skill on sentences of random difficulty: the t interval covers."""

    def covered(key):
        skill_key, difficulty_key, coin_key = jax.random.split(key, 3)
        skills_D = 0.1 * jax.random.normal(skill_key, (8,))
        easy_N = 0.2 * jax.random.normal(difficulty_key, (400,))
        chance_DxN = jnp.clip(0.6 + skills_D[:, None] + easy_N[None], 0, 1)
        correct_DxN = jax.random.uniform(coin_key, (8, 400)) < chance_DxN
        estimate = accuracy_estimate(correct_DxN, jnp.ones(400, bool))
        return jnp.stack([estimate.mean, estimate.sem])

    estimates = jax.lax.map(covered, jax.random.split(jax.random.key(0), 2000))
    means, sems = np.asarray(estimates).T
    truth = means.mean()
    assert means.std(ddof=1) == pytest.approx(np.sqrt((sems**2).mean()), rel=0.05)
    coverage = (np.abs(means - truth) < 2.365 * sems).mean()
    assert 0.93 < coverage < 0.99
