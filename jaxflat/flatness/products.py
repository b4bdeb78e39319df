"""Products of the Hessian, Gauss-Newton and Fisher matrices with vectors; no matrix is formed.

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
Product = Callable[[PyTree], PyTree]


def at_least_float32(tree: PyTree) -> PyTree:
    """The tree with 16-bit leaves widened; probes and tangents follow the parameters' dtype."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x, tree
    )


def wide_log_probs(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree
) -> tuple[jax.Array, jax.Array]:
    """The log-probabilities, 16-bit ones widened: exponentials and sums need more; the weights.

    TypeError where `log_probs_fn` returns no such pair.
    """
    result = log_probs_fn(params, batch)
    shapes = jax.tree.map(jnp.shape, result)
    pair = isinstance(result, tuple) and len(result) == 2
    if not pair or not shapes[0] or shapes[0][:-1] != shapes[1]:
        raise TypeError(
            "log_probs_fn must return log-probabilities (..., V) and weights (...), not what has "
            f"shapes {shapes}"
        )
    log_probs, weights = result
    return at_least_float32(log_probs), jnp.asarray(weights)


def loss_and_weight(loss_fn: LossFn, params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
    """The loss sum and weight of one microbatch; TypeError where `loss_fn` returns no such pair."""
    result = loss_fn(params, batch)
    shapes = jax.tree.map(jnp.shape, result)
    if not isinstance(result, tuple) or shapes != ((), ()):
        raise TypeError(f"loss_fn must return (loss_sum, weight), not what has shapes {shapes}")
    return result


def linearized_hessian(loss_fn: LossFn, params: PyTree, batch: PyTree) -> tuple[Product, jax.Array]:
    """`v -> H v` of one microbatch's loss sum, and its weight.

    The gradient is linearised once, so every further vector only pays for the linear part
    (forward over reverse; Pearlmutter, 1994), not for another evaluation of the gradient.
    """
    _, product_fn, weight = linearized_gradient(loss_fn, params, batch)
    return product_fn, weight


def unshared_hessian(loss_fn: LossFn, params: PyTree, batch: PyTree) -> tuple[Product, jax.Array]:
    """As `linearized_hessian`, for one vector: quicker, and at two thirds of the memory.

    Every product evaluates the gradient too, but nothing waits for a vector to come.
    """
    gradient_fn = jax.grad(partial(loss_and_weight, loss_fn), has_aux=True)

    def product(vector: PyTree) -> PyTree:
        at_batch = partial(gradient_fn, batch=batch)
        return jax.jvp(at_batch, (params,), (vector,), has_aux=True)[1]

    return product, loss_and_weight(loss_fn, params, batch)[1]


def linearized_gradient(
    loss_fn: LossFn, params: PyTree, batch: PyTree
) -> tuple[PyTree, Product, jax.Array]:
    """The gradient of one microbatch's loss sum, its derivative `v -> H v`, and the weight."""
    gradient_fn = jax.grad(partial(loss_and_weight, loss_fn), has_aux=True)
    return jax.linearize(lambda p: gradient_fn(p, batch), params, has_aux=True)


def linearized_gauss_newton_product(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree
) -> tuple[Product, jax.Array]:
    """`v -> G v` of one microbatch's loss sum, and its weight: one forward, one backward pass.

    G = sum_i w_i J_i' (diag(p_i) - p_i p_i') J_i with J_i the Jacobian of prediction i's logits
    (Schraudolph, 2002). It ignores constants over the vocabulary, so log-probabilities serve as
    logits.
    """
    log_probs, jvp_fn, weights = jax.linearize(
        lambda p: wide_log_probs(log_probs_fn, p, batch), params, has_aux=True
    )
    probs, transposed_fn = jnp.exp(log_probs), jax.linear_transpose(jvp_fn, params)
    scales = weights.astype(probs.dtype)[..., None]

    def product(vector: PyTree) -> PyTree:
        tangents = jvp_fn(vector)
        means = jnp.sum(probs * tangents, axis=-1, keepdims=True)
        (result,) = transposed_fn(scales * probs * (tangents - means))
        return result

    return product, weights.sum()


def linearized_fisher(
    log_probs_fn: LogProbsFn, params: PyTree, batch: PyTree, labels: jax.Array
) -> tuple[Product, jax.Array]:
    """`v -> sum_i w_i g_i (g_i . v)` of one microbatch, g_i = grad log p(labels_i); its weight.

    With labels that the model drew its mean is G v; with the data's labels it is the empirical
    Fisher matrix, another one (Kunstner, Balles & Hennig, 2019).
    """

    def of_labels(params: PyTree) -> tuple[jax.Array, jax.Array]:
        log_probs, weights = wide_log_probs(log_probs_fn, params, batch)
        return jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0], weights

    _, jvp_fn, weights = jax.linearize(of_labels, params, has_aux=True)
    transposed_fn = jax.linear_transpose(jvp_fn, params)

    def product(vector: PyTree) -> PyTree:
        (result,) = transposed_fn(weights.astype(jnp.result_type(float)) * jvp_fn(vector))
        return result

    return product, weights.sum()


def mean_product(
    product_of: Callable[[PyTree], tuple[Product, jax.Array]], batches: PyTree, vector: PyTree
) -> PyTree:
    """M v of the mean loss over microbatches; `product_of(batch)` gives one's v -> M v and weight.

    Microbatches come one after the other, so that memory is that of one.
    """

    def add_microbatch(total: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        product_fn, weight = product_of(batch)
        return jax.tree.map(jnp.add, total, product_fn(vector)), weight

    total, weights_M = jax.lax.scan(add_microbatch, jax.tree.map(jnp.zeros_like, vector), batches)
    return jax.tree.map(lambda x: x / weights_M.sum().astype(x.dtype), total)


@partial(jax.jit, static_argnames="loss_fn")
def mean_gradient(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """The gradient, shaped like params, of the mean loss over microbatches."""
    params = at_least_float32(params)

    def add_microbatch(total: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        gradient, weight = jax.grad(loss_fn, has_aux=True)(params, batch)
        return jax.tree.map(jnp.add, total, gradient), weight

    total, weights_M = jax.lax.scan(add_microbatch, jax.tree.map(jnp.zeros_like, params), batches)
    return jax.tree.map(lambda x: x / weights_M.sum().astype(x.dtype), total)


@partial(jax.jit, static_argnames="loss_fn")
def hessian_vector_product(
    loss_fn: LossFn, params: PyTree, batches: PyTree, vector: PyTree
) -> PyTree:
    """H v, shaped like params, of the mean loss sum(loss_sum) / sum(weight) over microbatches."""
    params, vector = at_least_float32(params), at_least_float32(vector)
    return mean_product(partial(unshared_hessian, loss_fn, params), batches, vector)


@partial(jax.jit, static_argnames="log_probs_fn")
def gauss_newton_vector_product(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, vector: PyTree
) -> PyTree:
    """G v, shaped like params, of the mean loss over microbatches."""
    params, vector = at_least_float32(params), at_least_float32(vector)
    linearized = partial(linearized_gauss_newton_product, log_probs_fn, params)
    return mean_product(linearized, batches, vector)


@partial(jax.jit, static_argnames="log_probs_fn")
def fisher_vector_product(
    log_probs_fn: LogProbsFn, params: PyTree, batches: PyTree, labels: jax.Array, vector: PyTree
) -> PyTree:
    """F v of the mean loss, F from one label a prediction: labels have a leading axis as batches.

    Labels: the data's (the empirical Fisher matrix), or drawn from the model (unbiased for G v).
    """
    params, vector = at_least_float32(params), at_least_float32(vector)
    return mean_product(
        lambda both: linearized_fisher(log_probs_fn, params, *both), (batches, labels), vector
    )
