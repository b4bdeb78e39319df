"""Pytrees of arrays as vectors: dtype, names of leaves, inner product and scaled sum."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def at_least_float32(tree: PyTree) -> PyTree:
    """Return the tree with 16-bit leaves in float32; probes and tangents take the same dtype."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x, tree
    )


def path_name(path: tuple) -> str:
    """Return a leaf's path as a string, e.g. 'layer_0/attention/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def inner(x: PyTree, y: PyTree) -> jax.Array:
    """Return the inner product over all leaves.

    It multiplies elementwise: the precision of a matrix product depends on the accelerator.
    """
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), x, y)
    return jnp.stack(jax.tree.leaves(products)).sum()


def add_scaled(x: PyTree, factor: float | jax.Array, y: PyTree) -> PyTree:
    """Return x + factor y."""
    return jax.tree.map(lambda a, b: a + factor * b, x, y)
