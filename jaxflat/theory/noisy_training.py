"""Training networks on zero-sum strings: by full gradients, and by SGD with noisy labels.

The other symbols determine the masked one, so at zero loss plain SGD has no noise. Add normal noise
of variance sigma^2 to the labels. Then Sigma = sigma^2 H at zero loss, and the drift is
d theta = -eta^2 sigma^2 / (4 B) grad tr H a step. Sampled words cause the same drift in a language
model.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxflat.theory.zero_sum import Network, masked_strings

SETTLING_RATE, SETTLING_STEPS = 0.05, 40_000
LEARNING_RATE, BATCH, NOISE = 0.05, 16, 1.0
NUM_STEPS, NUM_RECORDS = 16_000, 6

Weights = tuple[Array, Array]  # w_SxMxT and a_SxM of S networks


def random_networks(key: Array, num_seeds: int, length: int, num_neurons: int) -> Weights:
    """Draw independent normal weights of variance 1 / T, and outputs of variance 1 / M."""
    weight_key, output_key = jax.random.split(key)
    weights_SxMxT = jax.random.normal(weight_key, (num_seeds, num_neurons, length)) / length**0.5
    return weights_SxMxT, jax.random.normal(output_key, (num_seeds, num_neurons)) / num_neurons**0.5


def stack(networks: list[Network]) -> Weights:
    """Stack networks of one size into arrays."""
    columns = zip(*((n.weights_MxT, n.outputs_M) for n in networks), strict=True)
    weights_SxMxT, outputs_SxM = (jnp.asarray(np.stack(column)) for column in columns)
    return weights_SxMxT, outputs_SxM


def networks_of(weights: Weights) -> list[Network]:
    """Return the networks as a list."""
    return [Network(*pair) for pair in zip(*map(np.asarray, weights), strict=True)]


def gradient(weights: Weights, inputs_NxT: Array, targets_N: Array) -> Weights:
    """Return the gradient of the mean of (f(z) - y)^2 / 2, for one network."""

    def loss(weights: Weights) -> Array:
        weights_MxT, outputs_M = weights
        predicted_N = jax.nn.relu(inputs_NxT @ weights_MxT.T) @ outputs_M
        return jnp.mean((predicted_N - targets_N) ** 2) / 2

    return jax.grad(loss)(weights)


def descend(weights: Weights, by: Weights, rate: float) -> Weights:
    """Take one step against the gradient."""
    return jax.tree.map(lambda x, g: x - rate * g, weights, by)


@jax.jit
def settle(weights: Weights) -> Weights:
    """Run gradient descent on all sentences with right labels, to zero loss near the start."""
    inputs_NxT = jnp.asarray(masked_strings(weights[0].shape[-1], zero_sum=True))
    targets_N = -inputs_NxT.sum(axis=1)

    def step(_: Array, weights: Weights) -> Weights:
        return descend(weights, gradient(weights, inputs_NxT, targets_N), SETTLING_RATE)

    return jax.vmap(lambda one: jax.lax.fori_loop(0, SETTLING_STEPS, step, one))(weights)


@partial(jax.jit, static_argnames=("num_steps", "num_records"))
def noisy_sgd(
    weights: Weights,
    key: Array,
    noise: float,
    num_steps: int = NUM_STEPS,
    num_records: int = NUM_RECORDS,
) -> Weights:
    """Run SGD on fresh sentences, with normal noise of this size on labels; records RxSx...."""
    inputs_NxT = jnp.asarray(masked_strings(weights[0].shape[-1], zero_sum=True))

    def train(weights: Weights, key: Array) -> Weights:
        def step(i: Array, weights: Weights) -> Weights:
            sentence_key, label_key = jax.random.split(jax.random.fold_in(key, i))
            chosen_B = jax.random.randint(sentence_key, (BATCH,), 0, len(inputs_NxT))
            batch_BxT = inputs_NxT[chosen_B]
            errors_B = noise * jax.random.normal(label_key, (BATCH,))
            by = gradient(weights, batch_BxT, errors_B - batch_BxT.sum(axis=1))
            return descend(weights, by, LEARNING_RATE)

        def record(weights: Weights, index: Array) -> tuple[Weights, Weights]:
            first = index * num_steps
            weights = jax.lax.fori_loop(first, first + num_steps, step, weights)
            return weights, weights

        return jax.lax.scan(record, weights, jnp.arange(num_records))[1]

    keys = jax.random.split(key, len(weights[1]))
    return jax.vmap(train, out_axes=1)(weights, keys)
