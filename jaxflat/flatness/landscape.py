"""The loss along directions, over a plane, and on the line between two checkpoints.

Every value is a rise in nats over a reference on the same sentences. Its error, over microbatches,
is therefore the error of a paired difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Estimate, ratio_estimate
from jaxflat.flatness.inputs import LossFn, estimator
from jaxflat.flatness.sampling import normal_like
from jaxflat.flatness.trees import PyTree, add_scaled, at_least_float32, path_name


@partial(jax.jit, static_argnames="stacked")
def filter_normalized(
    key: jax.Array, params: PyTree, stacked: Callable[[str], bool] | None = None
) -> PyTree:
    """Return a random direction, shaped like params, with their filters' lengths (Li et al., 2018).

    key: of jax.random. A filter holds the weights that one unit reads: all entries along a leaf's
    first axis. A vector, such as biases and gains of norms, is one filter. `stacked(path)` marks
    leaves, named such as 'layer/kernel', whose axis 0 is a stack of layers; their filters lie
    within a layer. Compiled with `stacked` static.
    """

    def scale(path: tuple, direction: jax.Array, leaf: jax.Array) -> jax.Array:
        first = 1 if stacked is not None and stacked(path_name(path)) else 0
        axis = first if leaf.ndim > first else None
        lengths = [jnp.sqrt(jnp.sum(x**2, axis, keepdims=True)) for x in (leaf, direction)]
        return direction * (lengths[0] / lengths[1])

    params = at_least_float32(params)
    return jax.tree_util.tree_map_with_path(scale, normal_like(key, params), params)


@estimator()
def loss_rises(
    loss_fn: LossFn, params: PyTree, batches: PyTree, directions: list[PyTree], steps_GxD: jax.Array
) -> Estimate:
    """Return L(theta + sum_d steps[g, d] direction_d) - L(theta), mean and sem of shape (G,).

    L is the mean loss, in nats; errors are over sentences, of paired differences. directions: D
    pytrees shaped like params, for example of `filter_normalized`. steps_GxD: how far to go along
    each, at G points. One direction gives a slice, which `jaxflat.analysis.plot_path` draws if it
    leads to a second checkpoint; two give a plane.
    """
    params = at_least_float32(params)

    def moved(steps_D: jax.Array) -> PyTree:
        point = params
        for step, direction in zip(steps_D, directions, strict=True):
            point = add_scaled(point, step, direction)
        return point

    def microbatch(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        center, weight = loss_fn(params, batch)
        return jax.lax.map(lambda s: loss_fn(moved(s), batch)[0], steps_GxD) - center, weight

    return _estimate_points(*jax.lax.map(microbatch, batches))


@estimator("num_points")
def loss_barrier(
    loss_fn: LossFn, start: PyTree, end: PyTree, batches: PyTree, *, num_points: int
) -> Estimate:
    """Return L((1-t) start + t end) - (1-t) L(start) - t L(end) at num_points even t in [0, 1].

    Mean and sem have the shape (num_points,), in nats; errors are over sentences. The barrier is
    its maximum (Frankle et al., 2020). Choosing the maximum on the same sentences makes its error a
    little larger than the error of that point.
    """
    start, end = at_least_float32(start), at_least_float32(end)
    difference = jax.tree.map(jnp.subtract, end, start)
    steps_G = jnp.linspace(0, 1, num_points, dtype=jax.tree.leaves(start)[0].dtype)

    def microbatch(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        losses_G = jax.lax.map(
            lambda t: loss_fn(add_scaled(start, t, difference), batch)[0], steps_G
        )
        chord_G = (1 - steps_G) * losses_G[0] + steps_G * losses_G[-1]
        return losses_G - chord_G, loss_fn(start, batch)[1]

    return _estimate_points(*jax.lax.map(microbatch, batches))


def _estimate_points(sums_MxG: jax.Array, weights_M: jax.Array) -> Estimate:
    estimate = partial(ratio_estimate, over="sentences")
    return jax.vmap(estimate, in_axes=(1, None))(sums_MxG, weights_M)
