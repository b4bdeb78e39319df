"""The drift of label noise that theory predicts for a phase."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxflat.config import Config
from jaxflat.runs import builders
from jaxflat.runs.languages import language_kind


def predicted_drift(language: Config, phase: Config) -> float | None:
    """Return t = sum of eta_s^2 / B over a phase's steps s, 0 with exact targets.

    Label noise moves the parameters along the minimisers like the flow d theta / dt =
    -1/4 grad tr H, followed for time t (docs/theory.md, from Liu et al. 2023). B counts
    predictions of new words. None where this does not hold. It holds for plain SGD on the loss
    alone, without penalty or adversary, on new sentences with one masked word.

    language: a config's `language` section. phase: the settings of a phase.
    """
    plain = phase.optimizer.name == "sgd" and phase.optimizer.sgd.momentum == 0
    penalized = phase.flatness_penalty.strength or phase.adversary.strength
    fresh = language_kind(language).has_optimum and not language.stored_sentences
    if (
        not plain
        or penalized
        or not fresh
        or language.masking != "one"
        or phase.objective != "masked_lm"
    ):
        return None
    if phase.targets == "exact":
        return 0.0
    steps_K = jnp.arange(phase.steps, dtype=jnp.int32)
    rates_K = jax.vmap(builders.schedule(phase, anneal=False))(steps_K)
    return float(np.sum(np.square(rates_K, dtype=np.float64)) / phase.batch_size)
