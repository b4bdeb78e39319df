"""Products of the Hessian H, Gauss-Newton matrix G and Fisher matrix F with vectors; v' M v.

No matrix is formed. A loss is `loss_fn(params, batch) -> (loss_sum, weight)`, summed over
predictions. Log-probabilities are `log_probs_fn(params, batch) -> (log_probs_...xV, weights_...)`.
Each function sums over `batches`, a pytree with a leading axis of microbatches, and divides once
by the total weight. So H, G and F belong to the mean loss over predictions, in nats.

Quadratic forms v' M v take forward passes only. JAX stores nothing for a backward pass, so memory
stays below one gradient's. A function with a custom reverse rule (`jax.custom_vjp`) has no forward
derivative: JAX raises "rule for 'custom_lin' not implemented".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, ratio_estimate
from jaxflat.flatness.inputs import LogProbsFn, LossFn, estimator
from jaxflat.flatness.trees import PyTree, at_least_float32

Product = Callable[[PyTree], PyTree]
QuadraticForm = Callable[[PyTree], jax.Array]


# The mean loss over microbatches.


@estimator()
def mean_gradient(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """Return the gradient of the mean loss over predictions, in nats, shaped like params."""
    params = at_least_float32(params)

    def add_microbatch(total: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        gradient, weight = jax.grad(loss_fn, has_aux=True)(params, batch)
        return jax.tree.map(jnp.add, total, gradient), weight

    total, weights_M = jax.lax.scan(add_microbatch, jax.tree.map(jnp.zeros_like, params), batches)
    return jax.tree.map(lambda x: x / weights_M.sum().astype(x.dtype), total)


@estimator()
def hessian_vector_product(
    loss_fn: LossFn, params: PyTree, batches: PyTree, vector: PyTree
) -> PyTree:
    """Return H v, shaped like params, in nats; H is the Hessian of the mean loss.

    Forward over reverse derivatives (Pearlmutter, 1994): about the cost of two gradients.
    """
    params, vector = at_least_float32(params), at_least_float32(vector)
    return mean_product(partial(hessian_product, loss_fn, params), batches, vector)


@estimator()
def gauss_newton_vector_product(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, vector: PyTree
) -> PyTree:
    """Return G v, shaped like params, in nats; G is the Gauss-Newton matrix of the mean loss.

    G = sum_i w_i J_i' (diag p_i - p_i p_i') J_i / sum_i w_i, with J_i the Jacobian of prediction
    i's logits (Schraudolph, 2002). One forward and one backward pass.
    """
    params, vector = at_least_float32(params), at_least_float32(vector)
    return mean_product(partial(gauss_newton_product, log_probs_fn, params), batches, vector)


@estimator()
def fisher_vector_product(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, labels: jax.Array, vector: PyTree
) -> PyTree:
    """Return F v = sum_i w_i g_i (g_i . v) / sum_i w_i, g_i = grad log p(labels_i), in nats.

    The result is shaped like params. labels: integers, one a prediction, with the shape (M, ...) of
    the weights of all microbatches. The data's labels give the empirical Fisher matrix. Labels
    drawn from the model give an unbiased estimate of G v (Kunstner, Balles & Hennig, 2019). One
    forward and one backward pass.
    """
    params, vector = at_least_float32(params), at_least_float32(vector)
    return mean_product(
        lambda both: fisher_product(log_probs_fn, params, *both), (batches, labels), vector
    )


@estimator()
def hessian_quadratic_form(
    loss_fn: LossFn, params: PyTree, batches: PyTree, vector: PyTree
) -> jax.Array:
    """Return the scalar v' H v = d^2/dt^2 L(theta + t v) at t = 0, in nats; two forward passes."""
    params, vector = at_least_float32(params), at_least_float32(vector)
    forms_M, weights_M = jax.lax.map(lambda b: hessian_form(loss_fn, params, b, vector), batches)
    return forms_M.sum() / weights_M.sum().astype(forms_M.dtype)


@estimator()
def gauss_newton_quadratic_form(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, vector: PyTree
) -> jax.Array:
    """Return the scalar v' G v, the mean over predictions of Var_p(J v), in nats.

    J is the Jacobian of a prediction's logits and p its probabilities. One forward pass.
    """
    params, vector = at_least_float32(params), at_least_float32(vector)

    def microbatch(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        quadratic_form, weight = gauss_newton_form(log_probs_fn, params, batch)
        return quadratic_form(vector), weight

    forms_M, weights_M = jax.lax.map(microbatch, batches)
    return forms_M.sum() / weights_M.sum().astype(forms_M.dtype)


@estimator()
def curvature_along(
    loss_fn: LossFn, params: PyTree, batches: PyTree, directions: PyTree
) -> Estimate:
    """Return v_k' H v_k, mean and sem of shape (K,), in nats, with errors over microbatches.

    directions: a pytree like params with an additional axis 0 of K directions, such as
    `hessian_extremes(...).largest.vectors`. For eigenvectors of the same microbatches' H, these are
    the eigenvalues. The error is then the eigenvalue's, to first order: d lambda = v' dH v. On
    fresh sentences the values do not contain the bias from choosing v.
    """
    params, directions = at_least_float32(params), at_least_float32(directions)

    def microbatch(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        forms_K = jax.lax.map(lambda v: hessian_form(loss_fn, params, batch, v)[0], directions)
        return forms_K, loss_fn(params, batch)[1]

    forms_MxK, weights_M = jax.lax.map(microbatch, batches)
    estimate = partial(ratio_estimate, over="sentences")
    return jax.vmap(estimate, in_axes=(1, None))(forms_MxK, weights_M)


def mean_product(
    product_of: Callable[[PyTree], tuple[Product, jax.Array]], batches: PyTree, vector: PyTree
) -> PyTree:
    """Return M v; `product_of(batch)` returns one microbatch's v -> M v and weight.

    Microbatches run in sequence, so memory does not grow with their number.
    """

    def add_microbatch(total: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        product_fn, weight = product_of(batch)
        return jax.tree.map(jnp.add, total, product_fn(vector)), weight

    total, weights_M = jax.lax.scan(add_microbatch, jax.tree.map(jnp.zeros_like, vector), batches)
    return jax.tree.map(lambda x: x / weights_M.sum().astype(x.dtype), total)


# The loss sum of one microbatch. Each function also returns the microbatch's weight.


def linearized_gradient(
    loss_fn: LossFn, params: PyTree, batch: PyTree
) -> tuple[PyTree, Product, jax.Array]:
    """Return the gradient, its derivative `v -> H v`, and the weight.

    The gradient is linearised once. Each vector then pays for the linear part alone (forward over
    reverse; Pearlmutter, 1994), not for another evaluation of the gradient.
    """
    gradient_fn = jax.grad(loss_fn, has_aux=True)
    return jax.linearize(lambda p: gradient_fn(p, batch), params, has_aux=True)


def linearized_hessian(loss_fn: LossFn, params: PyTree, batch: PyTree) -> tuple[Product, jax.Array]:
    """Return `v -> H v` for many vectors, and the weight; see `linearized_gradient`."""
    _, product_fn, weight = linearized_gradient(loss_fn, params, batch)
    return product_fn, weight


def hessian_product(loss_fn: LossFn, params: PyTree, batch: PyTree) -> tuple[Product, jax.Array]:
    """Return `v -> H v` for one vector, and the weight.

    Each call evaluates the gradient again but stores no linearisation. For one vector this is
    faster than `linearized_hessian` and takes two thirds of its memory.
    """
    gradient_fn = jax.grad(loss_fn, has_aux=True)

    def product(vector: PyTree) -> PyTree:
        return jax.jvp(lambda p: gradient_fn(p, batch), (params,), (vector,), has_aux=True)[1]

    return product, loss_fn(params, batch)[1]


def gauss_newton_product(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree
) -> tuple[Product, jax.Array]:
    """Return `v -> G v`, one forward and one backward pass, and the weight.

    G = sum_i w_i J_i' (diag(p_i) - p_i p_i') J_i, with J_i the Jacobian of prediction i's logits
    (Schraudolph, 2002). G ignores constants over the vocabulary, so log-probabilities serve as
    logits.
    """
    log_probs, jvp_fn, weights = jax.linearize(
        lambda p: log_probs_fn(p, batch), params, has_aux=True
    )
    probs, transposed_fn = jnp.exp(log_probs), jax.linear_transpose(jvp_fn, params)
    scales = weights.astype(probs.dtype)[..., None]

    def product(vector: PyTree) -> PyTree:
        tangents = jvp_fn(vector)
        means = jnp.sum(probs * tangents, axis=-1, keepdims=True)
        (result,) = transposed_fn(scales * probs * (tangents - means))
        return result

    return product, weights.sum()


def fisher_product(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree, labels: jax.Array
) -> tuple[Product, jax.Array]:
    """Return `v -> sum_i w_i g_i (g_i . v)`, g_i = grad log p(labels_i), and the weight.

    With labels drawn from the model the mean is G v. With the data's labels it is the empirical
    Fisher matrix, which differs from F (Kunstner, Balles & Hennig, 2019).
    """

    def label_log_probs(params: PyTree) -> tuple[jax.Array, jax.Array]:
        log_probs, weights = log_probs_fn(params, batch)
        if labels.shape != weights.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(
                f"labels must be integers, one a prediction: {weights.shape} in a microbatch, not "
                f"{labels.dtype} {labels.shape}"
            )
        return jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0], weights

    _, jvp_fn, weights = jax.linearize(label_log_probs, params, has_aux=True)
    transposed_fn = jax.linear_transpose(jvp_fn, params)

    def product(vector: PyTree) -> PyTree:
        (result,) = transposed_fn(weights.astype(jnp.result_type(float)) * jvp_fn(vector))
        return result

    return product, weights.sum()


def hessian_form(
    loss_fn: LossFn, params: PyTree, batch: PyTree, vector: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Return v' H v = d^2/dt^2 of the loss sum at params + t v, and the weight."""

    def slope(params: PyTree) -> tuple[jax.Array, jax.Array]:
        _, slope, weight = jax.jvp(lambda p: loss_fn(p, batch), (params,), (vector,), has_aux=True)
        return slope, weight

    _, curvature, weight = jax.jvp(slope, (params,), (vector,), has_aux=True)
    return curvature, weight


def gauss_newton_form(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree
) -> tuple[QuadraticForm, jax.Array]:
    """Return `v -> v' G v`, one forward pass, and the weight.

    v' G v = sum_i w_i Var_{p_i}(J_i v), with G and J_i as in `gauss_newton_product`.
    """
    log_probs, jvp_fn, weights = jax.linearize(
        lambda p: log_probs_fn(p, batch), params, has_aux=True
    )
    probs = jnp.exp(log_probs)

    def quadratic_form(vector: PyTree) -> jax.Array:
        tangents = jvp_fn(vector)
        means = jnp.sum(probs * tangents, axis=-1, keepdims=True)
        variances = jnp.sum(probs * (tangents - means) ** 2, axis=-1)
        return jnp.sum(weights.astype(variances.dtype) * variances)

    return quadratic_form, weights.sum()
