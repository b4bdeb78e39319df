"""How much of the exact posterior of a hidden state is linear in a model's representations.

Shai et al., "Transformers represent belief state geometry in their residual stream"
(arXiv:2405.15943), regress the belief states of a process on the activations in the same way.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxflat.probes.ridge import equal_weights, moments


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
    weights_Nx1 = equal_weights(test.valid_N.astype(test.probs_NxC.dtype))
    mean_C = (weights_Nx1 * test.probs_NxC).sum(0)
    spreads_N = ((test.probs_NxC - mean_C[None]) ** 2).sum(1)
    return _errors(test, kernel_FxC, bias_C), jnp.where(test.valid_N, spreads_N, 0)


def _ridge(train: Beliefs, l2_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (kernels_LxFxC, biases_LxC) for raw features, one fit for each penalty.

    Each minimises mean |p - mean p - (x - mean x) W|^2 + l2 mean |x - mean x|^2 |W|^2 in closed
    form, by the eigenvectors of the features' covariance, which serve all penalties.
    """
    valid_N = train.valid_N.astype(train.probs_NxC.dtype)
    found = moments(train.features_NxF, train.probs_NxC, valid_N)
    mean_1xF, mean_1xC, gram_FxF, products_FxC = found
    squares_R, rotation_FxR = jnp.linalg.eigh(gram_FxF)
    penalties_L = l2_L * (jnp.trace(gram_FxF) + 1e-24)
    shrunk_LxR = 1 / (jnp.maximum(squares_R, 0)[None] + penalties_L[:, None])
    slopes_RxC = rotation_FxR.T @ products_FxC
    kernels_LxFxC = jnp.einsum("fr,lr,rc->lfc", rotation_FxR, shrunk_LxR, slopes_RxC)
    return kernels_LxFxC, mean_1xC - jnp.einsum("nf,lfc->lc", mean_1xF, kernels_LxFxC)


def _errors(data: Beliefs, kernel_FxC: jax.Array, bias_C: jax.Array) -> jax.Array:
    predicted_NxC = data.features_NxF @ kernel_FxC + bias_C[None]
    return jnp.where(data.valid_N, ((data.probs_NxC - predicted_NxC) ** 2).sum(1), 0)
