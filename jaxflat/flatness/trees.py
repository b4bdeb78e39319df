"""Vectors that are pytrees of arrays: their inner product, and the one sum that is needed often.

Elementwise rather than as matrix products, whose precision would be an accelerator's choice.
"""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def inner(x: PyTree, y: PyTree) -> jax.Array:
    """The inner product over all leaves."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), x, y)
    return jnp.stack(jax.tree.leaves(products)).sum()


def add_scaled(x: PyTree, factor: float | jax.Array, y: PyTree) -> PyTree:
    """x + factor y."""
    return jax.tree.map(lambda a, b: a + factor * b, x, y)
