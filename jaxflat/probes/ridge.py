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
        found = moments(fit[0], targets_NxC, targets_NxC.sum(1))
        mean_1xF, mean_1xC, gram_FxF, products_FxC = found
        penalty_FxF = l2 * jnp.trace(gram_FxF) * jnp.eye(len(gram_FxF), dtype=gram_FxF.dtype)
        kernel_FxC = jax.scipy.linalg.solve(gram_FxF + penalty_FxF, products_FxC, assume_a="pos")
        y_NxC = held_out_targets_NxC - mean_1xC
        errors_NxC = y_NxC - (held_out[0] - mean_1xF) @ kernel_FxC
        weights_Nx1 = equal_weights(held_out_targets_NxC.sum(1))
        return (weights_Nx1 * errors_NxC**2).sum() / (weights_Nx1 * y_NxC**2).sum()

    # Not as one batch: on CPUs a batch of matrices is factorised by other threads of the pool,
    # and where as many devices as there are threads wait for these, none is left to do it.
    tasks = [(fit[1][:, k], held_out[1][:, k]) for k in range(fit[1].shape[1])]
    return jnp.stack([of_task(task) for task in tasks]).mean()


def moments(x_NxF: jax.Array, y_NxC: jax.Array, chosen_N: jax.Array) -> tuple[jax.Array, ...]:
    """Return mean_1xF, mean_1xC, and E xx' FxF and E xy' FxC of centred x and y, where chosen."""
    weights_Nx1 = equal_weights(chosen_N)
    mean_1xF, mean_1xC = ((weights_Nx1 * a).sum(0, keepdims=True) for a in (x_NxF, y_NxC))
    x_NxF, y_NxC = x_NxF - mean_1xF, y_NxC - mean_1xC
    return mean_1xF, mean_1xC, x_NxF.T @ (weights_Nx1 * x_NxF), x_NxF.T @ (weights_Nx1 * y_NxC)


def equal_weights(chosen_N: jax.Array) -> jax.Array:
    """Return weights_Nx1 that sum to 1, equal where chosen."""
    return (chosen_N / jnp.maximum(chosen_N.sum(), 1))[:, None]
