"""Pre-training against a downstream task: the adversarial algorithm of Liu et al. (ICML 2023)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxflat.training.objectives import LossFn

DownstreamLoss = Callable[[Any, Any, Any], jax.Array]  # (params, fit, held_out) -> loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdversarialBatch:
    """A batch to pre-train on, and two disjoint draws of labelled sentences: to fit a head, and
    to see what it is worth."""

    masked: Any
    fit: Any
    held_out: Any


def adversarial_loss(
    loss_fn: LossFn, downstream_loss: DownstreamLoss, strength: float | jax.Array
) -> LossFn:
    """Return loss_fn(params, batch) -> (loss_sum, weight) of L - strength * D, summed like L.

    L is the pre-training loss of `loss_fn` in nats, D(params) = downstream_loss(params, fit,
    held_out) that of a head which is fitted anew for every params, so that the gradient knows how
    the head would answer (Liu, Xie, Li & Ma 2023, section 3: features that minimise L and not D).
    """

    def adversarial(params: Any, batch: AdversarialBatch) -> tuple[jax.Array, jax.Array]:
        loss_sum, weight = loss_fn(params, batch.masked)
        downstream = downstream_loss(params, batch.fit, batch.held_out)
        return loss_sum - strength * weight * downstream, weight

    return adversarial
