"""Training on zero-sum strings: its noise against the Hessian, and what stays without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.theory import noisy_training, zero_sum
from jaxflat.theory.noisy_training import BATCH, LEARNING_RATE


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def gradients(network, inputs_NxT):
    """Of f(z) by (w, a), NxP, written out."""
    active_NxM = (inputs_NxT @ network.weights_MxT.T > 0).astype(float)
    by_weights = (active_NxM * network.outputs_M)[..., None] * inputs_NxT[:, None]
    flat_NxP = by_weights.reshape(len(inputs_NxT), -1)
    return np.concatenate([flat_NxP, network.features(inputs_NxT)], axis=1)


def flat(weights):
    return np.concatenate([np.reshape(x, (x.shape[0], -1)) for x in weights], axis=1)


def test_steps_with_noisy_labels_have_the_covariance_of_the_hessian():
    """Of 40,000 first steps from the flattest network: eta^2 sigma^2 / B times H."""
    network, num_runs, noise = zero_sum.flattest(4), 40_000, 0.5
    start = noisy_training.stack([network] * num_runs)
    end = noisy_training.noisy_sgd(start, jax.random.key(0), noise, num_steps=1, num_records=1)
    steps_SxP = flat([np.asarray(x[0]) for x in end]) - flat([np.asarray(x) for x in start])
    gradients_NxP = gradients(network, zero_sum.masked_strings(4, zero_sum=True))
    hessian = gradients_NxP.T @ gradients_NxP / len(gradients_NxP)
    expected = (LEARNING_RATE * noise) ** 2 / BATCH * hessian
    found = steps_SxP.T @ steps_SxP / num_runs
    products_SxPxP = steps_SxP[:, :, None] * steps_SxP[:, None]
    sem = products_SxPxP.std(axis=0) / num_runs**0.5
    assert np.abs((found - expected) / sem).max() < 4.5
    drift_z = steps_SxP.mean(axis=0) / (steps_SxP.std(axis=0) / num_runs**0.5)
    assert np.abs(drift_z).max() < 4.5


def test_without_noise_a_network_of_zero_loss_stays():
    start = noisy_training.stack([zero_sum.flattest(4)] * 2)
    end = noisy_training.noisy_sgd(start, jax.random.key(0), 0.0, num_steps=20, num_records=2)
    np.testing.assert_allclose(flat([x[1] for x in end]), flat(start), atol=1e-12)
    moved = noisy_training.noisy_sgd(start, jax.random.key(0), 1.0, num_steps=20, num_records=2)
    assert np.abs(flat([x[1] for x in moved]) - flat(start)).max() > 1e-3
    assert not np.allclose(moved[0][1, 0], moved[0][1, 1])  # every network has its own noise


def test_settling_reaches_zero_loss_and_leaves_what_has_it():
    networks = noisy_training.random_networks(jax.random.key(1), 3, 4, 24)
    settled = noisy_training.networks_of(noisy_training.settle(networks))
    assert max(zero_sum.loss(network, 4) for network in settled) < 1e-6
    start = noisy_training.stack([zero_sum.flattest(4)])
    np.testing.assert_allclose(flat(noisy_training.settle(start)), flat(start), atol=1e-12)


def test_gradients_are_those_written_out():
    network = zero_sum.Network(*(np.asarray(x[0]) for x in noisy_training.random_networks(
        jax.random.key(2), 1, 4, 5)))  # fmt: skip
    inputs_NxT = zero_sum.masked_strings(4, zero_sum=True)
    targets_N = np.arange(len(inputs_NxT)) / 7
    weights = jax.tree.map(jnp.asarray, (network.weights_MxT, network.outputs_M))
    found = noisy_training.gradient(weights, jnp.asarray(inputs_NxT), jnp.asarray(targets_N))
    errors_N = network.predict(inputs_NxT) - targets_N
    expected_P = errors_N @ gradients(network, inputs_NxT) / len(inputs_NxT)
    np.testing.assert_allclose(flat([x[None] for x in found])[0], expected_P, atol=1e-12)
