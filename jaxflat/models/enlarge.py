"""Write a small model as a wider and deeper one that computes the same function (embed it).

Every width is tiled k times. A weight that sums over a tiled axis is divided by k. The code
released with Liu, Xie, Li, Ma (ICML 2023) does so; the rules here are for blocks that normalise
their input. Layer norms and RMS norms give each copy what they give the original.
Embeddings are tiled but not divided. The decoder is divided once; if it is tied to the embedding,
the final layer norm is divided instead. The number of heads grows and their size stays; in an
LSTM, each direction has k times as many units. Rotary positions depend on the size of heads alone.
Additional layers follow the small model's layers and are all zeros, so they add nothing to the
hidden state. An MLP with gates may be wider than k times the small one; the rest of its neurons are
zeros. They add nothing, and no gradient reaches them: each of their weights is multiplied by
another one that is 0.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.models.causal import gated_mlp_width

Path = tuple[Any, ...]

# The last module of a block -> the number of biases that the block adds to the hidden state. All
# of these have the same gradient.
EQUAL_BIASES = {"mlp_out": 2, "join": 1}


@partial(jax.jit, static_argnums=(1, 2))
def enlarge(params: Any, factor: int, extra_layers: int = 0) -> Any:
    """Return the parameters of a larger model with the same logits.

    params belongs to a model of make_language_model. The larger model is `factor` times as wide and
    has extra_layers additional layers.
    """

    def tile(path: Path, leaf: jax.Array) -> jax.Array:
        tiled_axes, divided = _tiling(path, "decoder" not in params)
        copies = jnp.tile(leaf, [factor if tiled else 1 for tiled in tiled_axes])
        return copies / factor if divided else copies

    wide = jax.tree_util.tree_map_with_path(tile, params)
    if "mlp_gate" in wide.get("stack", {}):
        num_neurons = gated_mlp_width(wide["token_embedding"].shape[1])
        wide = {**wide, "stack": _with_neurons(wide["stack"], num_neurons)}
    return _deepen(wide, extra_layers) if extra_layers else wide


def _with_neurons(stack: Any, num_neurons: int) -> Any:
    """Return stacked blocks whose MLPs have num_neurons; additional neurons are zeros."""
    more = num_neurons - stack["mlp_out"]["kernel"].shape[1]

    def pad(leaf: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(leaf, [(0, more if i == axis else 0) for i in range(leaf.ndim)])

    kernels = {"mlp_in": 2, "mlp_gate": 2, "mlp_out": 1}  # L x D x F, and L x F x D
    return stack | {name: {"kernel": pad(stack[name]["kernel"], i)} for name, i in kernels.items()}


def _deepen(params: Any, extra_layers: int) -> Any:
    """Return the parameters with extra_layers blocks of zeros after the last one."""
    if "last" not in params:

        def append(leaf: jax.Array) -> jax.Array:
            return jnp.pad(leaf, [(0, extra_layers), *[(0, 0)] * (leaf.ndim - 1)])

        return {**params, "stack": jax.tree.map(append, params["stack"])}
    zeros = jax.tree.map(jnp.zeros_like, params["last"])
    stacks = [params["stack"]] if "stack" in params else []
    added = [params["last"], *[zeros] * (extra_layers - 1)]
    stacks += [jax.tree.map(lambda leaf: leaf[None], block) for block in added]
    stack = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)
    return {**params, "stack": stack, "last": zeros}


def gauss_newton_factors(params: Any, factor: int, extra_layers: int = 0) -> Any:
    """Return the factors by which tr G_ll counts in the enlarged tr G: one a leaf, or one a layer.

    Let a leaf have c copies, each of them the original divided by d. By the chain rule and the
    symmetry between copies, each copy's gradient is g * d / c. The squared norms sum to
    |g|^2 * d^2 / c. Each added layer adds only the traces of its output biases. Each such bias has
    the trace of the last block's output bias: with n added biases, that trace counts n + 1 times.
    The reason: in a block of zeros only the output biases have a gradient. It equals the gradient
    of such a bias in the small model's last block. This holds for the
    Fisher and Gauss-Newton traces. The Hessian's second-derivative term scales differently and must
    be measured on the enlarged model.
    """

    last_block = "last" if "last" in params else "stack"

    def scale(path: Path, leaf: jax.Array) -> float | jax.Array:
        tiled_axes, divided = _tiling(path, "decoder" not in params)
        names = [part.key for part in path]
        copies = float(factor) ** (2 * divided - sum(tiled_axes))
        if names[0] != last_block or names[-1] != "bias" or names[1] not in EQUAL_BIASES:
            return copies
        count = 1 + EQUAL_BIASES[names[1]] * extra_layers
        if last_block == "last":
            return count * copies
        return jnp.full(len(leaf), copies).at[-1].multiply(count)

    return jax.tree_util.tree_map_with_path(scale, params)


def _tiling(path: Path, tied_decoder: bool) -> tuple[tuple[bool, ...], bool]:
    """Return which of a leaf's last axes are tiled, and whether its copies are divided by k."""
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
