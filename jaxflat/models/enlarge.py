"""A small transformer seen as a large one: the same function in a wider parametrisation.

Every width is tiled k times and the weights that sum over a tiled axis are divided by k, in the
manner of the code released with Liu, Xie, Li, Ma (ICML 2023), worked out here for pre-layer-norm
blocks: embeddings tile undivided, and what feeds the decoder is divided once (the decoder itself,
or the final layer norm where the decoder is tied to the embedding). The head size stays, heads
multiply.
"""

from typing import Any

import jax
import jax.numpy as jnp

Path = tuple[Any, ...]


def enlarge(params: Any, factor: int) -> Any:
    """Return the parameters of the `factor` times wider transformer with the same logits."""

    def tile(path: Path, leaf: jax.Array) -> jax.Array:
        tiled_axes, divided = _tiling(path, "decoder" not in params)
        copies = jnp.tile(leaf, [factor if tiled else 1 for tiled in tiled_axes])
        return copies / factor if divided else copies

    return jax.tree_util.tree_map_with_path(tile, params)


def gauss_newton_factors(params: Any, factor: int) -> Any:
    """Return, leaf by leaf, tr G_ll of the enlarged model divided by tr G_ll of the small one.

    With c copies of a leaf, each the original over d, the chain rule and the symmetry between
    the copies give each copy's gradient as g * d / c. Their squared norms add up to
    |g|^2 * d^2 / c. This holds for the Fisher and Gauss-Newton traces; the Hessian's
    second-derivative term scales otherwise and has to be measured on the enlarged model.
    """

    def scale(path: Path, leaf: jax.Array) -> float:
        tiled_axes, divided = _tiling(path, "decoder" not in params)
        return float(factor) ** (2 * divided - sum(tiled_axes))

    return jax.tree_util.tree_map_with_path(scale, params)


def _tiling(path: Path, tied_decoder: bool) -> tuple[tuple[bool, ...], bool]:
    """Return which of a leaf's last axes are tiled, and whether the copies are divided by k."""
    name = path[-1].key
    if name == "kernel" and path[-2].key == "qkv":  # D x 3 x D
        return (True, False, True), True
    if name == "kernel":
        return (True, True), True
    if name == "decoder":
        return (True, False), True
    if name == "decoder_bias":
        return (False,), False
    return (True,), tied_decoder and path[0].key == "final_norm"
