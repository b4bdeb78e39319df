"""Pre-training against a downstream task: the adversarial algorithm of Liu et al. (ICML 2023)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxflat.training.gradient import GradientFn


@dataclass(frozen=True)
class Adversary:
    """A head whose success training works against.

    downstream_loss(params, fit, held_out) is the loss of a head that is fitted to these parameters.
    """

    downstream_loss: Callable[[Any, Any, Any], jax.Array]
    strength: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdversarialBatch:
    """A pre-training batch, and two independent draws of labelled sentences.

    The head is fitted on `fit` and evaluated on `held_out`.
    """

    pretraining: Any
    fit: Any
    held_out: Any


def adversarial_gradient(
    gradient_fn: GradientFn, adversary: Adversary, batch: AdversarialBatch, params: Any
) -> tuple[jax.Array, Any]:
    """Return L - strength * D in nats, and its gradient.

    gradient_fn returns L, the mean loss of batch.pretraining, and its gradient. D(params) =
    downstream_loss(params, fit, held_out) is the loss of a head fitted to these params. The
    gradient therefore includes the response of the head (Liu, Xie, Li & Ma 2023, section 3:
    features that minimise L and not D).
    """
    loss, gradient = gradient_fn(params)
    downstream, slope = jax.value_and_grad(adversary.downstream_loss)(
        params, batch.fit, batch.held_out
    )
    total = jax.tree.map(lambda g, s: g - adversary.strength * s, gradient, slope)
    return loss - adversary.strength * downstream, total
