"""Layers that the models share: norms, embeddings, attention, and one transformer block.

The trained Transformer, CausalTransformer and Bert differ in the arguments of Block. A further
family needs other arguments and a layout of its checkpoints, not another block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": nn.gelu,  # by its tanh approximation
    "exact_gelu": partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}
# An MLP with one of these multiplies its input by an activated gate (Shazeer, 2020).
GATED_ACTIVATIONS = {"swiglu": nn.silu}
NORMS = {
    "layer_norm": partial(nn.remat(nn.LayerNorm, prevent_cse=False), use_fast_variance=False),
    "fast_layer_norm": nn.remat(nn.LayerNorm, prevent_cse=False),
    "rms_norm": nn.remat(nn.RMSNorm, prevent_cse=False),
}

KeysAndValues = tuple[jax.Array, jax.Array]  # of one layer, each BxHxTxE


def normalise(
    name: str, x: jax.Array, norm: str, epsilon: float, use_bias: bool = True
) -> jax.Array:
    """Normalise the last axis in x's own precision, with the gain and bias of module `name`.

    "layer_norm": gain * (x - mean x) / sqrt(var x + epsilon) + bias, without the bias if use_bias
    is False. "fast_layer_norm": the same with var x = mean x^2 - (mean x)^2, which reads x once
    and rounds more. "rms_norm": gain * x / sqrt(mean x^2 + epsilon), always without a bias (Zhang
    and Sennrich, NeurIPS 2019).

    Derivatives recompute the result from x, which takes less memory and time than storing it.
    """
    biases = {} if norm == "rms_norm" else {"use_bias": use_bias}
    # Linen by default reduces in float32, and so refuses float64.
    precision = {"param_dtype": x.dtype, "force_float32_reductions": False}
    return NORMS[norm](name=name, epsilon=epsilon, **biases, **precision)(x)


def rotate(x_NxLxE: jax.Array, positions_NxL: jax.Array, base: float) -> jax.Array:
    """Apply rotary position embedding (Su et al., 2021).

    The pair (x_i, x_{i + E/2}) turns by the angle position * base^(-2i/E). The product of a query
    and a key then depends on their positions only through the difference. Raises ValueError if E
    is odd.
    """
    head_size = x_NxLxE.shape[-1]
    if head_size % 2:
        raise ValueError(f"rotary positions need an even head size, got {head_size}")
    exponents_F = jnp.arange(0, head_size, 2, dtype=x_NxLxE.dtype) / head_size
    angles_NxLxF = (
        positions_NxL[:, :, None].astype(x_NxLxE.dtype) * base ** -exponents_F[None, None]
    )
    cos_NxLxF, sin_NxLxF = jnp.cos(angles_NxLxF), jnp.sin(angles_NxLxF)
    x_NxLxF, y_NxLxF = jnp.split(x_NxLxE, 2, axis=-1)
    turned_x_NxLxF = x_NxLxF * cos_NxLxF - y_NxLxF * sin_NxLxF
    turned_y_NxLxF = y_NxLxF * cos_NxLxF + x_NxLxF * sin_NxLxF
    return jnp.concatenate([turned_x_NxLxF, turned_y_NxLxF], axis=-1)


def product(x_RxD: jax.Array, kernel_DxF: jax.Array, dtype: Any) -> jax.Array:
    """Return x @ kernel in x's dtype, computed in `dtype` unless None; derivatives likewise."""
    if dtype is None:
        return x_RxD @ kernel_DxF
    return (x_RxD.astype(dtype) @ kernel_DxF.astype(dtype)).astype(x_RxD.dtype)


def dense(width: int, name: str, use_bias: bool, dtype: Any) -> nn.Dense:
    """Return a layer whose matrix product is computed in `dtype` unless None, as in `product`."""

    def dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **how: Any) -> jax.Array:
        factors = (x, kernel) if dtype is None else (x.astype(dtype), kernel.astype(dtype))
        return jax.lax.dot_general(*factors, dimensions, **how).astype(x.dtype)

    return nn.Dense(width, use_bias=use_bias, name=name, dot_general=dot_general)


class Projections(nn.Module):
    """Queries, keys and values by one matrix product, or by two if there are fewer queries."""

    use_bias: bool
    dtype: Any  # of the products

    @nn.compact
    def __call__(
        self, queries_BxMxD: jax.Array, keys_BxTxD: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        width = keys_BxTxD.shape[-1]
        initializer = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        kernel_Dx3xD = self.param("kernel", initializer, (width, 3, width), jnp.float32)
        bias_3xD = None
        if self.use_bias:
            bias_3xD = self.param("bias", nn.initializers.zeros, (3, width), jnp.float32)

        def project(x_BxLxD: jax.Array, parts: slice) -> list[jax.Array]:
            kernel_DxF = kernel_Dx3xD[:, parts].reshape(width, -1)
            flat_RxF = product(x_BxLxD.reshape(-1, width), kernel_DxF, self.dtype)
            if bias_3xD is not None:
                flat_RxF += bias_3xD[parts].reshape(1, -1)
            flat_RxCxD = flat_RxF.astype(self.dtype or flat_RxF.dtype).reshape(
                *x_BxLxD.shape[:-1], -1, width
            )
            return [flat_RxCxD[..., c, :] for c in range(flat_RxCxD.shape[-2])]

        if queries_BxMxD is keys_BxTxD:
            queries, keys, values = project(keys_BxTxD, slice(0, 3))
        else:
            (queries,) = project(queries_BxMxD, slice(0, 1))
            keys, values = project(keys_BxTxD, slice(1, 3))
        return queries, keys, values


class Attention(nn.Module):
    """Multi-head attention from M queries to U keys: the cached ones, then T new ones.

    Batch and heads share one axis N = B * H, which keeps each matrix product 3-D. Cached and new
    keys share one softmax but not one matrix product, so that no layer copies its cache.
    """

    num_heads: int
    rotary_base: float | None
    use_bias: bool
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(
        self,
        queries_BxMxD: jax.Array,
        keys_BxTxD: jax.Array,
        padding_BxU: jax.Array,
        query_positions_BxM: jax.Array,
        key_positions_BxU: jax.Array,
        cached: KeysAndValues | None,
    ) -> tuple[jax.Array, KeysAndValues]:
        """Return mixed_BxMxD, and the T new keys and values; no query sees padding."""
        width = keys_BxTxD.shape[-1]
        head_size = width // self.num_heads
        reals = queries_BxMxD.dtype  # of rotations and softmax; the products may have fewer bits

        def split_heads(x_BxLxD: jax.Array) -> jax.Array:
            x_BxLxHxE = x_BxLxD.reshape(*x_BxLxD.shape[:2], self.num_heads, head_size)
            return x_BxLxHxE.swapaxes(1, 2).reshape(-1, x_BxLxD.shape[1], head_size)

        def unmerge(x_NxLxE: jax.Array) -> jax.Array:
            return x_NxLxE.reshape(-1, self.num_heads, *x_NxLxE.shape[1:])

        def rotate_heads(x_NxLxE: jax.Array, positions_BxL: jax.Array) -> jax.Array:
            if self.rotary_base is None:
                return x_NxLxE
            positions_NxL = jnp.repeat(positions_BxL, self.num_heads, axis=0)
            turned_NxLxE = rotate(x_NxLxE.astype(reals), positions_NxL, self.rotary_base)
            return turned_NxLxE.astype(x_NxLxE.dtype)

        projected = Projections(self.use_bias, self.dtype, name="qkv")(queries_BxMxD, keys_BxTxD)
        q_NxMxE, k_NxTxE, v_NxTxE = (split_heads(x) for x in projected)
        q_NxMxE = rotate_heads(q_NxMxE, query_positions_BxM) / head_size**0.5
        k_NxTxE = rotate_heads(k_NxTxE, key_positions_BxU[:, -keys_BxTxD.shape[1] :])

        def attend(q_NxMxE: jax.Array, k_NxTxE: jax.Array) -> jax.Array:
            return jnp.einsum("nme,nte->nmt", q_NxMxE, k_NxTxE).astype(reals)

        scores_NxMxU = attend(q_NxMxE, k_NxTxE)
        num_cached = 0
        if cached is not None:
            old_k_NxSxE, old_v_NxSxE = (x.reshape(-1, *x.shape[2:]) for x in cached)
            num_cached = old_k_NxSxE.shape[1]
            old_scores_NxMxS = attend(q_NxMxE, old_k_NxSxE)
            scores_NxMxU = jnp.concatenate([old_scores_NxMxS, scores_NxMxU], axis=-1)
        excluded_NxMxU = jnp.repeat(padding_BxU, self.num_heads, axis=0)[:, None, :]
        if self.causal:
            later_BxMxU = key_positions_BxU[:, None, :] > query_positions_BxM[:, :, None]
            excluded_NxMxU |= jnp.repeat(later_BxMxU, self.num_heads, axis=0)
        lowest = jnp.finfo(scores_NxMxU.dtype).min
        weights_NxMxU = jax.nn.softmax(jnp.where(excluded_NxMxU, lowest, scores_NxMxU))
        weights_NxMxU = weights_NxMxU.astype(v_NxTxE.dtype)
        mixed_NxMxE = jnp.einsum("nmt,nte->nme", weights_NxMxU[..., num_cached:], v_NxTxE)
        if cached is not None:
            mixed_NxMxE += jnp.einsum("nmt,nte->nme", weights_NxMxU[..., :num_cached], old_v_NxSxE)
        mixed_BxMxD = unmerge(mixed_NxMxE).swapaxes(1, 2).reshape(queries_BxMxD.shape)
        out = dense(width, "out", self.use_bias, self.dtype)
        return out(mixed_BxMxD.astype(reals)), (unmerge(k_NxTxE), unmerge(v_NxTxE))


class Block(nn.Module):
    """One layer of a transformer, for the M positions asked for.

    With norm_first, h += Attention(norm(h)); h += MLP(norm(h)). Without,
    h = norm(h + Attention(h)); h = norm(h + MLP(h)).
    """

    num_heads: int
    mlp_width: int
    activation: str  # a key of ACTIVATIONS or GATED_ACTIVATIONS
    norm: str  # a key of NORMS
    epsilon: float  # of both norms
    norm_first: bool
    rotary_base: float | None  # None: attention itself knows no positions
    use_bias: bool  # in matrix products and norms
    causal: bool  # no position sees a later one
    dtype: Any = None  # of matrix products; None: the input's, which everything else keeps

    @nn.compact
    def __call__(
        self,
        hidden_BxTxD: jax.Array,
        padding_BxU: jax.Array,
        positions_BxM: jax.Array | None = None,
        cached: KeysAndValues | None = None,
        start: int | jax.Array = 0,
    ) -> tuple[jax.Array, KeysAndValues]:
        """Return hidden_BxMxD at the positions asked for (all T if None), and T keys and values.

        The T rows of hidden_BxTxD are positions start..start+T-1; positions_BxM counts them from
        0. They see one another and the U - T cached slots; slot t is position t. padding_BxU
        marks slots and rows that no position sees.
        """

        def normalised(name: str, x_BxLxD: jax.Array) -> jax.Array:
            return normalise(name, x_BxLxD, self.norm, self.epsilon, self.use_bias)

        def unchanged(name: str, x_BxLxD: jax.Array) -> jax.Array:
            del name
            return x_BxLxD

        before, after = (normalised, unchanged) if self.norm_first else (unchanged, normalised)
        read_BxTxD = before("attention_norm", hidden_BxTxD)
        num_old = padding_BxU.shape[1] - hidden_BxTxD.shape[1]
        old_S = jnp.arange(num_old, dtype=jnp.int32)
        new_T = start + jnp.arange(hidden_BxTxD.shape[1], dtype=jnp.int32)
        keys_BxU = jnp.broadcast_to(jnp.concatenate([old_S, new_T])[None], padding_BxU.shape)
        if positions_BxM is None:
            hidden_BxMxD, read_BxMxD, queries_BxM = hidden_BxTxD, read_BxTxD, keys_BxU[:, num_old:]
        else:
            hidden_BxMxD = take_positions(hidden_BxTxD, positions_BxM)
            read_BxMxD = take_positions(read_BxTxD, positions_BxM)
            queries_BxM = start + positions_BxM.astype(jnp.int32)
        attention = Attention(
            self.num_heads,
            self.rotary_base,
            self.use_bias,
            self.causal,
            self.dtype,
            name="attention",
        )
        mixed_BxMxD, new = attention(
            read_BxMxD, read_BxTxD, padding_BxU, queries_BxM, keys_BxU, cached
        )
        hidden_BxMxD = after("attention_norm", hidden_BxMxD + mixed_BxMxD)
        outer_BxMxD = self._mlp(before("mlp_norm", hidden_BxMxD))
        return after("mlp_norm", hidden_BxMxD + outer_BxMxD), new

    def _mlp(self, x_BxMxD: jax.Array) -> jax.Array:
        """Two dense layers around the activation, which derivatives recompute."""
        bias, dtype = self.use_bias, self.dtype
        inner_BxMxF = dense(self.mlp_width, "mlp_in", bias, dtype)(x_BxMxD)
        if self.activation in GATED_ACTIVATIONS:
            gate_BxMxF = dense(self.mlp_width, "mlp_gate", bias, dtype)(x_BxMxD)
            activate = GATED_ACTIVATIONS[self.activation]
            gated = jax.checkpoint(lambda gate, x: activate(gate) * x, prevent_cse=False)
            outer_BxMxF = gated(gate_BxMxF, inner_BxMxF)
        else:
            activate = ACTIVATIONS[self.activation]
            outer_BxMxF = jax.checkpoint(activate, prevent_cse=False)(inner_BxMxF)
        return dense(x_BxMxD.shape[-1], "mlp_out", bias, dtype)(outer_BxMxF)


def scan_layers(
    call: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    layer: nn.Module,
    num_layers: int,
    hidden_BxTxD: jax.Array,
    cached: KeysAndValues | None = None,
) -> tuple[jax.Array, Any]:
    """Apply num_layers layers by call(layer, hidden_BxTxD, cached) -> (hidden_BxTxD, output).

    Parameters, caches and outputs have a leading axis of layers.
    """
    stack = nn.scan(
        call, variable_axes={"params": 0}, split_rngs={"params": True}, length=num_layers
    )
    return stack(layer, hidden_BxTxD, cached)


def rematerialised(block: Callable[..., Any]) -> Callable[..., Any]:
    """Return the block's class; derivatives store its input, and recompute its activations."""
    return nn.remat(block, prevent_cse=False)


def embedding(model: Any, name: str, num_rows: int) -> jax.Array:
    """Return a trainable table_RxD of a model; call it from the model's compact __call__."""
    shape = (num_rows, model.width)
    return model.param(name, nn.initializers.normal(model.width**-0.5), shape, jnp.float32)


def padding_mask(lengths_B: jax.Array, num_positions: int) -> jax.Array:
    """Return padding_BxT: which positions follow the end of their sentence."""
    times_T = jnp.arange(num_positions, dtype=lengths_B.dtype)
    return times_T[None, :] >= lengths_B[:, None]


def take_positions(x_BxTxD: jax.Array, positions_BxM: jax.Array) -> jax.Array:
    """Return x_BxMxD: the rows of x at each sentence's own positions."""
    return jnp.take_along_axis(x_BxTxD, positions_BxM[:, :, None], axis=1)
