"""A head in closed form, through which gradients reach the features."""

import jax
import jax.numpy as jnp

Examples = tuple[jax.Array, jax.Array]
"""features_NxF and targets_NxKxC: one-hot labels of K tasks, all 0 where a task has none."""


def unexplained_variance(fit: Examples, held_out: Examples, l2: float | jax.Array) -> jax.Array:
    """Return the share of the labels' variance that ridge regression leaves, mean over K tasks.

    For each task, over the examples that it has labels for,

        W = argmin mean |y - mean y - (x - mean x) W|^2 + l2 mean |x - mean x|^2 |W|^2

    on `fit` (Hoerl & Kennard 1970), and sum |y - mean y - (x - mean x) W|^2 / sum |y - mean y|^2
    on `held_out`, with the means of `fit`: 0 where the features give the labels away, about 1
    where they say nothing.
    """

    def of_task(targets: tuple[jax.Array, jax.Array]) -> jax.Array:
        targets_NxC, held_out_targets_NxC = targets
        weights_Nx1 = _weights(targets_NxC)
        mean_1xF = (weights_Nx1 * fit[0]).sum(0, keepdims=True)
        mean_1xC = (weights_Nx1 * targets_NxC).sum(0, keepdims=True)
        x_NxF, y_NxC = fit[0] - mean_1xF, targets_NxC - mean_1xC
        gram_FxF = x_NxF.T @ (weights_Nx1 * x_NxF)
        penalty_FxF = l2 * jnp.trace(gram_FxF) * jnp.eye(len(gram_FxF), dtype=gram_FxF.dtype)
        moments_FxC = x_NxF.T @ (weights_Nx1 * y_NxC)
        kernel_FxC = jax.scipy.linalg.solve(gram_FxF + penalty_FxF, moments_FxC, assume_a="pos")
        y_NxC = held_out_targets_NxC - mean_1xC
        errors_NxC = y_NxC - (held_out[0] - mean_1xF) @ kernel_FxC
        weights_Nx1 = _weights(held_out_targets_NxC)
        return (weights_Nx1 * errors_NxC**2).sum() / (weights_Nx1 * y_NxC**2).sum()

    # Not as one batch: on CPUs a batch of matrices is factorised by other threads of the pool,
    # and where as many devices as there are threads wait for these, none is left to do it.
    tasks = [(fit[1][:, k], held_out[1][:, k]) for k in range(fit[1].shape[1])]
    return jnp.stack([of_task(task) for task in tasks]).mean()


def _weights(targets_NxC: jax.Array) -> jax.Array:
    """Equal weights that sum to 1 over the examples with a label."""
    labelled_Nx1 = targets_NxC.sum(1, keepdims=True)
    return labelled_Nx1 / jnp.maximum(labelled_Nx1.sum(), 1)
