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
    """A pre-training batch, and two independent draws of labelled sentences.

    The head is fitted on `fit` and evaluated on `held_out`.
    """

    masked: Any
    fit: Any
    held_out: Any


def adversarial_loss(
    loss_fn: LossFn, downstream_loss: DownstreamLoss, strength: float | jax.Array
) -> LossFn:
    """Return loss_fn(params, batch) -> (loss_sum, weight) of L - strength * D, summed like L.

    L is the pre-training loss of `loss_fn` in nats. D(params) = downstream_loss(params, fit,
    held_out) is the loss of a head fitted to these params. The gradient therefore includes the
    response of the head (Liu, Xie, Li & Ma 2023, section 3: features that minimise L and not D).
    """

    def adversarial(params: Any, batch: AdversarialBatch) -> tuple[jax.Array, jax.Array]:
        loss_sum, weight = loss_fn(params, batch.masked)
        downstream = downstream_loss(params, batch.fit, batch.held_out)
        return loss_sum - strength * weight * downstream, weight

    return adversarial
