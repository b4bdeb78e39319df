"""Curvatures of one batch's loss that training can differentiate, each together with the loss.

Two controls take the place of a curvature: the parameters' norm and the features' rank.

The functions return (loss_sum, weight, curvature): the loss summed over predictions, the sum of
their weights, and the mean curvature along the vectors. So a training step shares one forward pass
between the loss and its curvature. The gradient of a curvature takes third derivatives for H, and
the derivative of one forward derivative for G.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxflat.flatness.inputs import LossFn
from jaxflat.flatness.products import hessian_product
from jaxflat.flatness.sampling import normal_like, rademacher_like
from jaxflat.flatness.trees import PyTree, inner

Vectors = tuple[PyTree, ...]
LossAndCurvature = tuple[jax.Array, jax.Array, jax.Array]
LossAndLogProbsFn = Callable[
    [PyTree, PyTree], tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
]
"""(params, batch) -> ((loss_sum, weight), (log_probs_...xV, weights_...))."""


def gauss_newton_curvature(
    loss_and_log_probs_fn: LossAndLogProbsFn, params: PyTree, batch: PyTree, vectors: Vectors
) -> LossAndCurvature:
    """Return the loss, and the mean of v' G v = sum_i w_i Var_{p_i}(J_i v) / sum_i w_i.

    p_i is the model's distribution for prediction i, and J_i the Jacobian of its logits
    (Schraudolph, 2002). With random signs v the expectation is tr G (Hutchinson, 1990).
    """

    def forward(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        (loss_sum, weight), (log_probs, weights) = loss_and_log_probs_fn(params, batch)
        return log_probs, (loss_sum, weight, weights)

    log_probs, jvp_fn, (loss_sum, weight, weights) = jax.linearize(forward, params, has_aux=True)
    probs = jnp.exp(log_probs)

    def weighted_variance(vector: PyTree) -> jax.Array:
        tangents = jvp_fn(vector)
        means = jnp.sum(probs * tangents, axis=-1, keepdims=True)
        return jnp.sum(weights * jnp.sum(probs * (tangents - means) ** 2, axis=-1))

    variances = jnp.stack([weighted_variance(vector) for vector in vectors])
    return loss_sum, weight, variances.mean() / weights.sum()


def hessian_curvature(
    loss_fn: LossFn, params: PyTree, batch: PyTree, vectors: Vectors
) -> LossAndCurvature:
    """Return the loss, and the mean of v' H v, the second derivative of the mean loss along v."""

    def along(vector: PyTree) -> LossAndCurvature:
        def slope(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            value, slope, weight = jax.jvp(
                lambda p: loss_fn(p, batch), (params,), (vector,), has_aux=True
            )
            return slope, (value, weight)

        _, curvature, (value, weight) = jax.jvp(slope, (params,), (vector,), has_aux=True)
        return value, weight, curvature / weight

    values, weights, curvatures = zip(*map(along, vectors), strict=True)
    return values[0], weights[0], jnp.stack(curvatures).mean()


def squared_norm(
    loss_fn: LossFn, params: PyTree, batch: PyTree, vectors: Vectors
) -> LossAndCurvature:
    """Return the loss, and |params|^2 instead of a curvature, as a control."""
    return *loss_fn(params, batch), inner(params, params)


def feature_rank(
    loss_fn: LossFn,
    features_fn: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]],
    params: PyTree,
    batch: PyTree,
    vectors: Vectors,
) -> LossAndCurvature:
    """Return the loss, and the effective rank of the features instead of a curvature.

    features_fn(params, batch) -> (features_...xD, weights_...) as in `effective_rank`.
    """
    return *loss_fn(params, batch), effective_rank(*features_fn(params, batch))


def effective_rank(features_xD: jax.Array, weights_x: jax.Array) -> jax.Array:
    """Return (tr C)^2 / tr C^2 for the weighted covariance C of features, between 1 and D.

    This is R_0 of Bartlett, Long, Lugosi and Tsigler (PNAS 2020), an effective rank in their bounds
    on linear regression, which is what a probe fits. Its gradient is finite at every C except 0.
    The entropy of singular values (Roy and Vetterli, 2007) has an infinite gradient at the value 0.
    Returns nan if all features are equal.
    """
    features_NxD = features_xD.reshape(-1, features_xD.shape[-1])
    weights_Nx1 = weights_x.reshape(-1, 1) / weights_x.sum()
    mean_1xD = (weights_Nx1 * features_NxD).sum(0, keepdims=True)
    centered_NxD = jnp.sqrt(weights_Nx1) * (features_NxD - mean_1xD)
    covariance_DxD = centered_NxD.T @ centered_NxD
    return jnp.trace(covariance_DxD) ** 2 / (covariance_DxD**2).sum()


def random_signs(
    num_vectors: int, previous: Vectors | None, params: PyTree, batch: PyTree, key: jax.Array
) -> Vectors:
    """Return independent random signs, a function of the key only."""
    return tuple(rademacher_like(k, params) for k in jax.random.split(key, num_vectors))


def power_step(
    loss_fn: LossFn, previous: Vectors, params: PyTree, batch: PyTree, key: jax.Array
) -> Vectors:
    """Return H v / |H v| for the unit vector v of the last step.

    Over the steps v turns towards the eigenvector of H whose eigenvalue has the largest magnitude
    (power iteration), as far as batches and parameters change slowly.
    """
    (vector,) = previous
    product_fn, _ = hessian_product(loss_fn, params, batch)
    return (_unit(product_fn(vector)),)


def first_vector(params: PyTree) -> Vectors:
    """Return the unit vector from which power steps start, the same in every run."""
    return (_unit(normal_like(jax.random.key(0), params)),)


def _unit(vector: PyTree) -> PyTree:
    norm = jnp.sqrt(inner(vector, vector))
    return jax.tree.map(lambda x: x / norm, vector)
