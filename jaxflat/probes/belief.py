"""How much of the exact posterior of a hidden state is linear in a model's representations.

Shai et al., "Transformers represent belief state geometry in their residual stream"
(arXiv:2405.15943), regress the belief states of a process on the activations in the same way.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beliefs:
    """Features with what an ideal observer of the words knows; leading axes may be added.

    features_NxF; probs_NxC: the exact posterior of the hidden symbol; valid_N bool: which
    sentences have one.
    """

    features_NxF: jax.Array
    probs_NxC: jax.Array
    valid_N: jax.Array


def belief_errors(
    train: Beliefs, validation: Beliefs, test: Beliefs, l2_L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (errors_N, spreads_N) of the test sentences: |p - phat|^2 and |p - mean p|^2.

    R^2 = 1 - sum(errors) / sum(spreads). Both are 0 where invalid. phat comes from the valid
    training sentences, with the penalty of least error on the validation sentences (the larger
    one where they tie).
    """
    fitted = _ridge(train, l2_L)
    missed_L = jax.vmap(lambda fit: _errors(validation, *fit).sum())(fitted)
    best = len(l2_L) - 1 - jnp.argmin(missed_L[::-1])
    kernel_FxC, bias_C = jax.tree.map(lambda x: x[best], fitted)
    weights_N = _weights(test)
    mean_C = weights_N @ test.probs_NxC
    spreads_N = ((test.probs_NxC - mean_C[None]) ** 2).sum(1)
    return _errors(test, kernel_FxC, bias_C), jnp.where(test.valid_N, spreads_N, 0)


def _ridge(train: Beliefs, l2_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (kernels_LxFxC, biases_LxC) for raw features, one fit for each penalty.

    Each minimises mean_n |x_n W + b - p_n|^2 + l2 |W|^2 over features centred and scaled to a
    mean squared norm of 1, in closed form: W = (X'X / N + l2)^-1 X'P / N, by the eigenvectors of
    X'X / N, which serve all penalties.
    """
    weights_N = _weights(train)
    mean_F, mean_C = weights_N @ train.features_NxF, weights_N @ train.probs_NxC
    centred_NxF = train.features_NxF - mean_F[None]
    scale = jnp.sqrt(weights_N @ (centred_NxF**2).sum(1)) + 1e-12
    inputs_NxF = centred_NxF / scale
    weighted_FxN = inputs_NxF.T * weights_N[None]
    squares_F, rotation_FxR = jnp.linalg.eigh(weighted_FxN @ inputs_NxF)
    slopes_RxC = rotation_FxR.T @ (weighted_FxN @ (train.probs_NxC - mean_C[None]))
    shrunk_LxR = 1 / (jnp.maximum(squares_F, 0)[None] + l2_L[:, None])
    kernels_LxFxC = jnp.einsum("fr,lr,rc->lfc", rotation_FxR, shrunk_LxR, slopes_RxC) / scale
    return kernels_LxFxC, mean_C[None] - jnp.einsum("f,lfc->lc", mean_F, kernels_LxFxC)


def _weights(data: Beliefs) -> jax.Array:
    valid_N = data.valid_N.astype(data.features_NxF.dtype)
    return valid_N / jnp.maximum(valid_N.sum(), 1)


def _errors(data: Beliefs, kernel_FxC: jax.Array, bias_C: jax.Array) -> jax.Array:
    predicted_NxC = data.features_NxF @ kernel_FxC + bias_C[None]
    return jnp.where(data.valid_N, ((data.probs_NxC - predicted_NxC) ** 2).sum(1), 0)
