"""The lookup table: a control that represents a sentence by its true conditional probabilities."""

import jax
import jax.numpy as jnp


def lookup_features(log_probs_BxTxV: jax.Array, kind: str) -> jax.Array:
    """Return features_BxTxV for probes: kind "p" gives p, kind "log_p" gives log p.

    Both describe the same function at zero excess loss, but a linear probe reads them differently.
    log p is at least log 1e-6, so that impossible words have finite features. Raises ValueError
    for another kind.
    """
    if kind == "p":
        return jnp.exp(log_probs_BxTxV)
    if kind == "log_p":
        return jnp.maximum(log_probs_BxTxV, jnp.log(1e-6))
    raise ValueError(f"lookup-table features must be p or log_p, got {kind!r}")
