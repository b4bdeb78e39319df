"""Products of the Hessian and the Gauss-Newton matrix with vectors, never forming the matrix.

A loss is `loss_fn(params, batch) -> (loss_sum, weight)`, summed over predictions; log-probabilities
are `log_probs_fn(params, batch) -> (log_probs_...xV, weights_...)`. Either is measured over
`batches`, a pytree with a leading axis of microbatches, and divided once by the total weight.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
LossFn = Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]
LogProbsFn = Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]


def at_least_float32(tree: PyTree) -> PyTree:
    """The tree with 16-bit leaves widened; probes and tangents follow the parameters' dtype."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x, tree
    )


def linearized_hessian(
    loss_fn: LossFn, params: PyTree, batch: PyTree
) -> tuple[Callable[[PyTree], PyTree], jax.Array]:
    """`v -> H v` of one microbatch's loss sum, and its weight.

    The gradient is linearised once, so every further vector only pays for the linear part
    (forward over reverse; Pearlmutter, 1994), not for another evaluation of the gradient.
    """
    gradient_fn = jax.grad(loss_fn, has_aux=True)
    _, product_fn, weight = jax.linearize(lambda p: gradient_fn(p, batch), params, has_aux=True)
    return product_fn, weight


def linearized_gauss_newton(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree
) -> tuple[Callable[[PyTree], jax.Array], jax.Array]:
    """`v -> v' G v` of one microbatch's loss sum, and its weight; no backward pass.

    G = sum_i w_i J_i' (diag(p_i) - p_i p_i') J_i with J_i the Jacobian of prediction i's logits,
    so v' G v = sum_i w_i Var_{p_i}(J_i v)   (Schraudolph, 2002). The variance ignores constants
    over the vocabulary, so log-probabilities serve as logits.
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


@partial(jax.jit, static_argnames="loss_fn")
def hessian_vector_product(
    loss_fn: LossFn, params: PyTree, batches: PyTree, vector: PyTree
) -> PyTree:
    """H v, shaped like params, of the mean loss sum(loss_sum) / sum(weight) over microbatches."""
    params, vector = at_least_float32(params), at_least_float32(vector)

    def add_microbatch(total: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        product_fn, weight = linearized_hessian(loss_fn, params, batch)
        return jax.tree.map(jnp.add, total, product_fn(vector)), weight

    total, weights_M = jax.lax.scan(add_microbatch, jax.tree.map(jnp.zeros_like, params), batches)
    return jax.tree.map(lambda x: x / weights_M.sum().astype(x.dtype), total)


@partial(jax.jit, static_argnames="log_probs_fn")
def gauss_newton_quadratic_form(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, vector: PyTree
) -> jax.Array:
    """v' G v of the mean loss: the mean over predictions of Var_p(J v), in nats, forward only."""
    params, vector = at_least_float32(params), at_least_float32(vector)

    def microbatch(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        quadratic_form, weight = linearized_gauss_newton(log_probs_fn, params, batch)
        return quadratic_form(vector), weight

    forms_M, weights_M = jax.lax.map(microbatch, batches)
    return forms_M.sum() / weights_M.sum().astype(forms_M.dtype)
