"""The mean loss of a batch and its gradient, by parts of the batch where that saves memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxflat.training.objectives import LossFn

GradientFn = Callable[[Any], tuple[jax.Array, Any]]  # params -> (mean loss in nats, gradient)


def loss_and_gradient(
    loss_fn: LossFn, batch: Any, params: Any, num_shards: int = 1, num_microbatches: int = 1
) -> tuple[jax.Array, Any]:
    """Return the mean loss of a batch in nats, and its gradient.

    num_microbatches > 1 takes equal parts of the batch one after the other, so that the activations
    of one part at a time are in memory. The result is that of the whole batch, up to rounding.

    num_shards > 1 cuts the batch into equal parts and flattens the gradient of each into one vector
    before the sum. With one part on each device, devices then need one reduction instead of one for
    every parameter, which XLA's CPU backend would run in sequence.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def sums(examples: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        return sum_over_microbatches(partial(value_and_grad, params), examples, num_microbatches)

    if num_shards == 1:
        (loss_sum, weight), gradient = sums(batch)
        return loss_sum / weight, jax.tree.map(lambda g: g / weight, gradient)
    shards = jax.tree.map(lambda x: x.reshape(num_shards, -1, *x.shape[1:]), batch)
    (sums_S, weights_S), gradients = jax.vmap(sums)(shards)
    _, unravel = ravel_pytree(params)
    flat_SxP = jax.vmap(lambda g: ravel_pytree(g)[0])(gradients)
    return sums_S.sum() / weights_S.sum(), unravel(flat_SxP.sum(0) / weights_S.sum())


def sum_over_microbatches(function: Callable[[Any], Any], batch: Any, num_microbatches: int) -> Any:
    """Return the sum of function(examples), a tree of arrays, over equal parts of a batch.

    Parts are taken one after the other. Part k has the examples k, k + num_microbatches, ..., so
    that a batch divided over devices is divided in each part, too, without moving an example.
    """
    if num_microbatches == 1:
        return function(batch)
    parts = jax.tree.map(
        lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts)),
    )

    def add(total: Any, examples: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(examples)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return total
