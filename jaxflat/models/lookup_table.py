"""The lookup table: a "model" whose representation of a sentence is the true conditionals."""

import jax
import jax.numpy as jnp


def lookup_features(log_probs_BxTxV: jax.Array, kind: str) -> jax.Array:
    """Return the probe features of the table, p or log p, as features_BxTxV.

    Both describe the same function at zero excess loss; a linear probe reads them differently.
    log p is cut at log 1e-6 so that impossible words stay finite.
    """
    if kind == "p":
        return jnp.exp(log_probs_BxTxV)
    if kind == "log_p":
        return jnp.maximum(log_probs_BxTxV, jnp.log(1e-6))
    raise ValueError(f"lookup-table features must be p or log_p, got {kind!r}")
