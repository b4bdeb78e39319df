"""The mean loss of a batch and its gradient, by parts of the batch where that saves work."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxflat.training.objectives import LossFn

GradientFn = Callable[[Any], tuple[jax.Array, Any]]  # params -> (mean loss in nats, gradient)


@dataclass(frozen=True)
class Division:
    """How a step divides its batch. The parts' sums add up to the batch's, up to rounding.

    num_microbatches: equal parts, taken one after the other, so that the activations of one part
    at a time are in memory. num_shards: equal parts of each of these, one for each device. Their
    gradients are flattened into one vector before the sum. Devices then need one reduction instead
    of one for every parameter, which XLA's CPU backend would run in sequence. lengths: numbers of
    positions, ascending. Each microbatch is cut to the smallest of these that holds its longest
    sentence; () cuts nothing. A branch is compiled for each.
    """

    num_shards: int = 1
    num_microbatches: int = 1
    lengths: tuple[int, ...] = ()


WHOLE = Division()


def loss_and_gradient(
    loss_fn: LossFn, batch: Any, params: Any, division: Division = WHOLE
) -> tuple[jax.Array, Any]:
    """Return the mean loss of a batch in nats, and its gradient."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if division.num_shards == 1:
        (loss_sum, weight), gradient = sum_over_microbatches(
            partial(value_and_grad, params), batch, division
        )
        return loss_sum / weight, jax.tree.map(lambda g: g / weight, gradient)

    def by_shard(examples: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        shards = jax.tree.map(lambda x: x.reshape(division.num_shards, -1, *x.shape[1:]), examples)
        sums, gradients = jax.vmap(partial(value_and_grad, params))(shards)
        return sums, jax.vmap(lambda g: ravel_pytree(g)[0])(gradients)

    (sums_S, weights_S), flat_SxP = sum_over_microbatches(by_shard, batch, division)
    _, unravel = ravel_pytree(params)
    return sums_S.sum() / weights_S.sum(), unravel(flat_SxP.sum(0) / weights_S.sum())


def sum_over_microbatches(function: Callable[[Any], Any], batch: Any, division: Division) -> Any:
    """Return the sum of function(examples), a tree of arrays, over the microbatches of a batch.

    Of n microbatches, microbatch k has the examples k, k + n, ..., so that a batch divided over
    devices is divided in each microbatch, too, without moving an example.
    """
    number = division.num_microbatches
    if division.lengths:
        function = _without_padding(function, division.lengths)
    if number == 1:
        return function(batch)
    parts = jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts)),
    )

    def add(total: Any, examples: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(examples)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return total


def _without_padding(
    function: Callable[[Any], Any], lengths: tuple[int, ...]
) -> Callable[[Any], Any]:
    """Return function(examples), computed on the least of `lengths` that holds all their words.

    examples: a batch with lengths_B and cut(length).
    """

    def on_first(length: int, examples: Any) -> Any:
        return function(examples.cut(length))

    def call(examples: Any) -> Any:
        longest = examples.lengths_B.max()
        chosen = jnp.searchsorted(jnp.asarray(lengths, longest.dtype), longest)
        return jax.lax.switch(chosen, [partial(on_first, length) for length in lengths], examples)

    return call
