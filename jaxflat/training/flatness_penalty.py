"""A penalty on flatness: training minimises the loss plus a multiple of a curvature."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.training.gradient import Division, sum_over_microbatches
from jaxflat.training.objectives import LossFn

Vectors = tuple[Any, ...]  # trees shaped like the parameters


@dataclass(frozen=True)
class FlatnessPenalty:
    """A differentiable curvature of one batch's mean loss along vectors that each step chooses.

    next_vectors(previous vectors or None, params, batch, key) -> the vectors of a step.
    loss_and_curvature(params, batch, vectors) -> (loss_sum, weight, mean curvature).
    excess_loss(params, batch) -> (nats above the optimum, summed; weight). Negative strengths act
    only in steps whose mean excess loss is at most max_excess. With max_excess 0 they always act.
    """

    next_vectors: Callable[[Vectors | None, Any, Any, jax.Array], Vectors]
    loss_and_curvature: Callable[[Any, Any, Vectors], tuple[jax.Array, jax.Array, jax.Array]]
    excess_loss: LossFn
    max_excess: float

    def acting_strength(
        self, strength: jax.Array, params: Any, batch: Any, division: Division
    ) -> jax.Array:
        """Return the strength in the step on this batch: itself, or 0."""
        if not self.max_excess:
            return strength
        excess_sum, weight = sum_over_microbatches(
            partial(self.excess_loss, params), batch, division
        )
        acts = (strength > 0) | (excess_sum / weight <= self.max_excess)
        return jnp.where(acts, strength, 0)


def penalized_loss(penalty: FlatnessPenalty, vectors: Vectors, strength: jax.Array) -> LossFn:
    """Return loss_fn(params, batch) -> (loss_sum, weight) with the gradient of L + strength * C.

    C is the mean curvature along the vectors. The value is the loss sum of L alone, in nats, so
    that the curves of all strengths show the same loss.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        loss_sum, weight, curvature = penalty.loss_and_curvature(params, batch, vectors)
        addend = strength.astype(curvature.dtype) * weight * curvature
        return loss_sum + (addend - jax.lax.stop_gradient(addend)), weight

    return loss_fn
