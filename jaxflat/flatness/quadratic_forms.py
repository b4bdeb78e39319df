"""Quadratic forms of the Hessian and the Gauss-Newton matrix: forward passes only.

What is not propagated backward need not be stored: memory stays below that of one gradient. A form
is one number for all parameters together; for terms by parameter leaf see `products` and `trace`.
Functions with a custom reverse rule (`jax.custom_vjp`) have no forward derivative and cannot be
measured this way: JAX stops with "rule for 'custom_lin' not implemented".
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, ratio_estimate
from jaxflat.flatness.products import LogProbsFn, LossFn, PyTree, at_least_float32, wide_log_probs


def hessian_form(
    loss_fn: LossFn, params: PyTree, batch: PyTree, vector: PyTree
) -> tuple[jax.Array, jax.Array]:
    """v' H v of one microbatch's loss sum, and its weight: d^2/dt^2 of the loss at params + t v."""

    def slope(params: PyTree) -> tuple[jax.Array, jax.Array]:
        _, slope, weight = jax.jvp(lambda p: loss_fn(p, batch), (params,), (vector,), has_aux=True)
        return slope, weight

    _, curvature, weight = jax.jvp(slope, (params,), (vector,), has_aux=True)
    return curvature, weight


def linearized_gauss_newton(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree
) -> tuple[Callable[[PyTree], jax.Array], jax.Array]:
    """`v -> v' G v` of one microbatch's loss sum, and its weight.

    G = sum_i w_i J_i' (diag(p_i) - p_i p_i') J_i with J_i the Jacobian of prediction i's logits,
    so v' G v = sum_i w_i Var_{p_i}(J_i v)   (Schraudolph, 2002). The variance ignores constants
    over the vocabulary, so log-probabilities serve as logits.
    """
    log_probs, jvp_fn, weights = jax.linearize(
        lambda p: wide_log_probs(log_probs_fn, p, batch), params, has_aux=True
    )
    probs = jnp.exp(log_probs)

    def quadratic_form(vector: PyTree) -> jax.Array:
        tangents = jvp_fn(vector)
        means = jnp.sum(probs * tangents, axis=-1, keepdims=True)
        variances = jnp.sum(probs * (tangents - means) ** 2, axis=-1)
        return jnp.sum(weights.astype(variances.dtype) * variances)

    return quadratic_form, weights.sum()


@partial(jax.jit, static_argnames="loss_fn")
def hessian_quadratic_form(
    loss_fn: LossFn, params: PyTree, batches: PyTree, vector: PyTree
) -> jax.Array:
    """v' H v of the mean loss, in nats."""
    params, vector = at_least_float32(params), at_least_float32(vector)
    forms_M, weights_M = jax.lax.map(lambda b: hessian_form(loss_fn, params, b, vector), batches)
    return forms_M.sum() / weights_M.sum().astype(forms_M.dtype)


@partial(jax.jit, static_argnames="loss_fn")
def curvature_along(
    loss_fn: LossFn, params: PyTree, batches: PyTree, directions: PyTree
) -> Estimate:
    """v_k' H v_k along K directions (a leading axis of every leaf), with errors over microbatches.

    Along eigenvectors of the same microbatches' H it is the eigenvalues, and the error is theirs to
    first order: d lambda = v' dH v. On fresh sentences it has no bias from having chosen v.
    """
    params, directions = at_least_float32(params), at_least_float32(directions)

    def microbatch(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        forms_K = jax.lax.map(lambda v: hessian_form(loss_fn, params, batch, v)[0], directions)
        return forms_K, loss_fn(params, batch)[1]

    forms_MxK, weights_M = jax.lax.map(microbatch, batches)
    estimate = partial(ratio_estimate, over="sentences")
    return jax.vmap(estimate, in_axes=(1, None))(forms_MxK, weights_M)


@partial(jax.jit, static_argnames="log_probs_fn")
def gauss_newton_quadratic_form(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, vector: PyTree
) -> jax.Array:
    """v' G v of the mean loss: the mean over predictions of Var_p(J v), in nats."""
    params, vector = at_least_float32(params), at_least_float32(vector)

    def microbatch(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        quadratic_form, weight = linearized_gauss_newton(log_probs_fn, params, batch)
        return quadratic_form(vector), weight

    forms_M, weights_M = jax.lax.map(microbatch, batches)
    return forms_M.sum() / weights_M.sum().astype(forms_M.dtype)
