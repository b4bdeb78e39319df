"""A small model seen as a large one of its family: the same function, wider and deeper.

Every width is tiled k times and the weights that sum over a tiled axis are divided by k, in the
manner of the code released with Liu, Xie, Li, Ma (ICML 2023), worked out here for pre-layer-norm
blocks: embeddings tile undivided, and what feeds the decoder is divided once (the decoder itself,
or the final layer norm where the decoder is tied to the embedding). The head size stays, heads
multiply; of an LSTM the units of each direction multiply. Layers that the small model lacks follow
its own, all zeros: what they would add to the hidden state is nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

Path = tuple[Any, ...]

# Where a block ends, and how many biases it adds to the hidden state: those have one gradient.
EQUAL_BIASES = {"mlp_out": 2, "join": 1}


def enlarge(params: Any, factor: int, extra_layers: int = 0) -> Any:
    """Return the parameters of a `factor` times wider model with the same logits.

    It has extra_layers more layers. params: of a Transformer or an Lstm.
    """

    def tile(path: Path, leaf: jax.Array) -> jax.Array:
        tiled_axes, divided = _tiling(path, "decoder" not in params)
        copies = jnp.tile(leaf, [factor if tiled else 1 for tiled in tiled_axes])
        return copies / factor if divided else copies

    wide = jax.tree_util.tree_map_with_path(tile, params)
    return _deepen(wide, extra_layers) if extra_layers else wide


def _deepen(params: Any, extra_layers: int) -> Any:
    """Return the parameters with extra_layers blocks of zeros behind the last one."""
    nothing = jax.tree.map(jnp.zeros_like, params["last"])
    stacks = [params["stack"]] if "stack" in params else []
    added = [params["last"], *[nothing] * (extra_layers - 1)]
    stacks += [jax.tree.map(lambda leaf: leaf[None], block) for block in added]
    stack = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)
    return {**params, "stack": stack, "last": nothing}


def gauss_newton_factors(params: Any, factor: int, extra_layers: int = 0) -> Any:
    """Return, leaf by leaf, what the small model's tr G_ll is multiplied by to add up to tr G.

    With c copies of a leaf, each the original over d, the chain rule and the symmetry between
    the copies give each copy's gradient as g * d / c. Their squared norms add up to
    |g|^2 * d^2 / c. In a block of zeros every parameter meets a factor of zero but for the biases
    added to the hidden state, and these have the gradient of the last block's own such bias: it
    counts once more for each. This holds for the Fisher and Gauss-Newton traces; the Hessian's
    second-derivative term scales otherwise and has to be measured on the enlarged model.
    """

    def scale(path: Path, leaf: jax.Array) -> float:
        tiled_axes, divided = _tiling(path, "decoder" not in params)
        names = [part.key for part in path]
        is_bias = names[0] == "last" and names[-1] == "bias"
        like_it = EQUAL_BIASES.get(names[1], 0) if is_bias else 0
        return (1 + like_it * extra_layers) * float(factor) ** (2 * divided - sum(tiled_axes))

    return jax.tree_util.tree_map_with_path(scale, params)


def _tiling(path: Path, tied_decoder: bool) -> tuple[tuple[bool, ...], bool]:
    """Return which of a leaf's last axes are tiled, and whether the copies are divided by k."""
    module, name = ["", *(part.key for part in path)][-2:]
    if (module, name) == ("qkv", "kernel") or name in ("input_kernel", "recurrent_kernel"):
        return (True, False, True), True  # D x 3 x D, D x 4 x E
    if name == "kernel":
        return (True, True), True
    if name == "decoder":
        return (True, False), True
    if name == "decoder_bias":
        return (False,), False
    return (True,), tied_decoder and path[0].key == "final_norm"
