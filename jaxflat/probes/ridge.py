"""Ridge regression on features (Hoerl & Kennard 1970), in closed form.

    W = argmin mean |y - mean y - (x - mean x) W|^2 + l2 mean |x - mean x|^2 |W|^2

With rows a = sqrt(weight) (x - mean x) and b = sqrt(weight) (y - mean y), W = (A'A + c I)^-1 A'B.
Where features outnumber examples, the dual form W = A'(AA' + c I)^-1 B needs no F x F matrix
(Saunders, Gammerman & Vovk 1998).

`unexplained_variance` regresses labels; gradients pass through the fit to the features.
`belief_errors` regresses exact posteriors of a hidden state (belief states). It follows Shai et
al., "Transformers represent belief state geometry in their residual stream" (arXiv:2405.15943).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

FeaturesAndTargets = tuple[jax.Array, jax.Array]
"""features_NxF and targets_NxKxC: one-hot labels of K tasks, all 0 if a task has no label."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beliefs:
    """Features and exact posteriors given the words; leading axes may be added.

    features_NxF; probs_NxC: the exact posterior of the hidden symbol; valid_N bool: which
    sentences have one.
    """

    features_NxF: jax.Array
    probs_NxC: jax.Array
    valid_N: jax.Array


def unexplained_variance(
    fit: FeaturesAndTargets, held_out: FeaturesAndTargets, l2: float | jax.Array
) -> jax.Array:
    """Return the share of the labels' variance that the regression leaves, mean over K tasks.

    Each task fits W on its labelled examples of `fit`. Its share is
    sum |y - mean y - (x - mean x) W|^2 / sum |y - mean y|^2 on `held_out`, with the means of `fit`.
    It is 0 if the features determine the labels, and about 1 if they are independent of them.
    """

    def unexplained_share(targets: tuple[jax.Array, jax.Array]) -> jax.Array:
        targets_NxC, held_out_targets_NxC = targets
        mean_1xF, mean_1xC, a_NxF, b_NxC = _centre(fit[0], targets_NxC, targets_NxC.sum(1))
        kernel_FxC = _ridge_kernel(a_NxF, b_NxC, l2)
        held_out_NxC = held_out_targets_NxC - mean_1xC
        errors_NxC = held_out_NxC - (held_out[0] - mean_1xF) @ kernel_FxC
        weights_Nx1 = _equal_weights(held_out_targets_NxC.sum(1))
        return (weights_Nx1 * errors_NxC**2).sum() / (weights_Nx1 * held_out_NxC**2).sum()

    # Not as one batch: XLA's CPU backend factorises a batch of matrices on other threads of the
    # pool. If every thread of the pool is a device that waits for them, the call deadlocks.
    tasks = [(fit[1][:, k], held_out[1][:, k]) for k in range(fit[1].shape[1])]
    return jnp.stack([unexplained_share(task) for task in tasks]).mean()


def belief_errors(
    train: Beliefs, validation: Beliefs, test: Beliefs, l2_L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (errors_N, spreads_N) of the test sentences: |p - phat|^2 and |p - mean p|^2.

    R^2 = 1 - sum(errors) / sum(spreads). Both are 0 for invalid sentences. phat is fitted on the
    valid training sentences. The penalty is the one with the least error on the validation
    sentences, or the larger of two equal ones.
    """
    fits = _fit_penalties(train, l2_L)
    errors_L = jax.vmap(lambda fit: _belief_errors(validation, *fit).sum())(fits)
    best = len(l2_L) - 1 - jnp.argmin(errors_L[::-1])
    kernel_FxC, bias_C = jax.tree.map(lambda x: x[best], fits)
    weights_Nx1 = _equal_weights(test.valid_N.astype(test.probs_NxC.dtype))
    mean_C = (weights_Nx1 * test.probs_NxC).sum(0)
    spreads_N = ((test.probs_NxC - mean_C[None]) ** 2).sum(1)
    return _belief_errors(test, kernel_FxC, bias_C), jnp.where(test.valid_N, spreads_N, 0)


def _fit_penalties(train: Beliefs, l2_L: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (kernels_LxFxC, biases_LxC) for uncentred features, one fit for each penalty.

    All penalties share the eigenvectors of A'A or, in the dual form, of AA'.
    """
    valid_N = train.valid_N.astype(train.probs_NxC.dtype)
    mean_1xF, mean_1xC, a_NxF, b_NxC = _centre(train.features_NxF, train.probs_NxC, valid_N)
    if _is_dual(a_NxF):
        products_RxR = a_NxF @ a_NxF.T
        squares_R, left_NxR = jnp.linalg.eigh(products_RxR)
        rotation_FxR, slopes_RxC = a_NxF.T @ left_NxR, left_NxR.T @ b_NxC
    else:
        products_RxR = a_NxF.T @ a_NxF
        squares_R, rotation_FxR = jnp.linalg.eigh(products_RxR)
        slopes_RxC = rotation_FxR.T @ (a_NxF.T @ b_NxC)
    penalties_L = l2_L * (jnp.trace(products_RxR) + 1e-24)
    shrunk_LxR = 1 / (jnp.maximum(squares_R, 0)[None] + penalties_L[:, None])
    kernels_LxFxC = jnp.einsum("fr,lr,rc->lfc", rotation_FxR, shrunk_LxR, slopes_RxC)
    return kernels_LxFxC, mean_1xC - jnp.einsum("nf,lfc->lc", mean_1xF, kernels_LxFxC)


def _belief_errors(data: Beliefs, kernel_FxC: jax.Array, bias_C: jax.Array) -> jax.Array:
    predicted_NxC = data.features_NxF @ kernel_FxC + bias_C[None]
    return jnp.where(data.valid_N, ((data.probs_NxC - predicted_NxC) ** 2).sum(1), 0)


def _ridge_kernel(a_NxF: jax.Array, b_NxC: jax.Array, l2: float | jax.Array) -> jax.Array:
    """Return kernel_FxC for the rows a and b."""

    def solve(products_RxR: jax.Array, right_RxC: jax.Array) -> jax.Array:
        identity_RxR = jnp.eye(len(products_RxR), dtype=products_RxR.dtype)
        penalised_RxR = products_RxR + l2 * jnp.trace(products_RxR) * identity_RxR
        return jax.scipy.linalg.solve(penalised_RxR, right_RxC, assume_a="pos")

    if _is_dual(a_NxF):
        return a_NxF.T @ solve(a_NxF @ a_NxF.T, b_NxC)
    return solve(a_NxF.T @ a_NxF, a_NxF.T @ b_NxC)


def _is_dual(a_NxF: jax.Array) -> bool:
    return a_NxF.shape[0] < a_NxF.shape[1]


def _centre(x_NxF: jax.Array, y_NxC: jax.Array, chosen_N: jax.Array) -> tuple[jax.Array, ...]:
    """Return mean_1xF and mean_1xC of the chosen, and the rows a_NxF and b_NxC."""
    weights_Nx1 = _equal_weights(chosen_N)
    mean_1xF, mean_1xC = ((weights_Nx1 * a).sum(0, keepdims=True) for a in (x_NxF, y_NxC))
    roots_Nx1 = jnp.sqrt(weights_Nx1)
    return mean_1xF, mean_1xC, roots_Nx1 * (x_NxF - mean_1xF), roots_Nx1 * (y_NxC - mean_1xC)


def _equal_weights(chosen_N: jax.Array) -> jax.Array:
    """Return weights_Nx1: equal for chosen examples, 0 for the others, with sum 1."""
    return (chosen_N / jnp.maximum(chosen_N.sum(), 1))[:, None]
