"""A decoder-only pre-layer-norm transformer with the parametrisation of GPT-2 and OPT."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxflat.models.transformer import Projections, embedding

ACTIVATIONS = {
    "gelu": nn.gelu,  # by its tanh approximation
    "exact_gelu": partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}


class Cache(NamedTuple):
    """Keys and values of T slots in all L layers; slot t is position t."""

    keys_LxBxTxHxE: jax.Array
    values_LxBxTxHxE: jax.Array


def empty_cache(model: "CausalTransformer", batch_size: int, length: int, dtype: Any) -> Cache:
    """Return a cache of zeros with room for `length` positions, in the parameters' dtype."""
    head_size = model.width // model.num_heads
    shape = (model.num_layers, batch_size, length, model.num_heads, head_size)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def layer_norm(name: str, x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Normalise the last axis in x's own precision, the variance taken around the mean."""
    return nn.LayerNorm(
        name=name,
        epsilon=epsilon,
        param_dtype=x.dtype,
        use_fast_variance=False,
        force_float32_reductions=False,
    )(x)


class CausalAttention(nn.Module):
    """Attention of S new positions to T cached slots and to one another, where visible.

    Old and new keys meet in one softmax but in separate matrix products, so that a layer reads
    its part of the cache without copying it. Returns mixed_BxSxD and the new keys and values.
    """

    num_heads: int

    @nn.compact
    def __call__(
        self, x_BxSxD: jax.Array, cached: tuple[jax.Array, jax.Array], visible_SxU: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        width = x_BxSxD.shape[-1]
        shape = (*x_BxSxD.shape[:2], self.num_heads, width // self.num_heads)
        projected = Projections(name="qkv")(x_BxSxD, x_BxSxD)
        q_BxSxHxE, k_BxSxHxE, v_BxSxHxE = (x.reshape(shape) for x in projected)
        q_BxSxHxE = q_BxSxHxE / shape[-1] ** 0.5
        old_k_BxTxHxE, old_v_BxTxHxE = cached
        num_old = old_k_BxTxHxE.shape[1]
        # U = T + S: the cached slots, then the new positions.
        scores_BxHxSxU = jnp.concatenate(
            [jnp.einsum("bshe,buhe->bhsu", q_BxSxHxE, keys) for keys in (old_k_BxTxHxE, k_BxSxHxE)],
            axis=-1,
        )
        lowest = jnp.finfo(scores_BxHxSxU.dtype).min
        weights = jax.nn.softmax(jnp.where(visible_SxU[None, None], scores_BxHxSxU, lowest))
        mixed_BxSxHxE = jnp.einsum("bhsu,buhe->bshe", weights[..., :num_old], old_v_BxTxHxE)
        mixed_BxSxHxE += jnp.einsum("bhsu,buhe->bshe", weights[..., num_old:], v_BxSxHxE)
        mixed_BxSxD = nn.Dense(width, name="out")(mixed_BxSxHxE.reshape(x_BxSxD.shape))
        return mixed_BxSxD, (k_BxSxHxE, v_BxSxHxE)


class CausalBlock(nn.Module):
    """h += Attention(norm(h)); h += MLP(norm(h)), for S new positions."""

    num_heads: int
    mlp_width: int
    activation: str

    @nn.compact
    def __call__(
        self, hidden_BxSxD: jax.Array, cached: tuple[jax.Array, jax.Array], visible_SxU: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        normed_BxSxD = layer_norm("attention_norm", hidden_BxSxD)
        attention = CausalAttention(self.num_heads, name="attention")
        mixed_BxSxD, new = attention(normed_BxSxD, cached, visible_SxU)
        hidden_BxSxD += mixed_BxSxD
        inner_BxSxF = nn.Dense(self.mlp_width, name="mlp_in")(layer_norm("mlp_norm", hidden_BxSxD))
        outer = nn.Dense(hidden_BxSxD.shape[-1], name="mlp_out")
        return hidden_BxSxD + outer(ACTIVATIONS[self.activation](inner_BxSxF)), new


class CausalTransformer(nn.Module):
    """Next-token model over num_tokens tokens (V, special ones included); the decoder is tied.

    All blocks are scanned: their parameters have a leading axis of layers.
    """

    num_tokens: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str

    @nn.compact
    def __call__(
        self,
        tokens_BxS: jax.Array,
        cache: Cache | None = None,
        start: int | jax.Array = 0,
        token_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Return the logits_BxSxV of the next tokens, and the cache with these S tokens in it.

        Without a cache the tokens are positions 0..S-1 and the returned cache holds just them.
        With one they are positions start..start+S-1 and see the slots below start besides.
        With token_ids there are logits of these tokens only, in this order.
        Raises ValueError where S tokens have no room; a traced start cannot be checked.
        """
        num_new = tokens_BxS.shape[1]
        num_slots = num_new if cache is None else cache.keys_LxBxTxHxE.shape[2]
        _check_room(start, num_new, min(num_slots, self.max_length))
        start = jnp.asarray(start, jnp.int32)

        tokens_VxD = embedding(self, "token_embedding", self.num_tokens)
        positions_PxD = embedding(self, "position_embedding", self.max_length)
        new_S = jnp.arange(num_new, dtype=jnp.int32)
        hidden_BxSxD = tokens_VxD[tokens_BxS] + positions_PxD[start + new_S][None]
        old = cache
        if old is None:
            old = empty_cache(self, tokens_BxS.shape[0], 0, hidden_BxSxD.dtype)
        old_T = jnp.arange(old.keys_LxBxTxHxE.shape[2], dtype=jnp.int32)
        visible_SxT = jnp.broadcast_to(old_T < start, (num_new, len(old_T)))
        visible_SxU = jnp.concatenate([visible_SxT, new_S[None, :] <= new_S[:, None]], axis=1)
        stack = nn.scan(
            lambda block, h_BxSxD, cached: block(h_BxSxD, cached, visible_SxU),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        block = CausalBlock(self.num_heads, self.mlp_width, self.activation, name="stack")
        hidden_BxSxD, new = stack(block, hidden_BxSxD, tuple(old))
        decoder_VxD = tokens_VxD if token_ids is None else tokens_VxD[token_ids]
        logits_BxSxV = layer_norm("final_norm", hidden_BxSxD) @ decoder_VxD.T
        if cache is None:
            return logits_BxSxV, Cache(*new)
        return logits_BxSxV, jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 2), cache, Cache(*new)
        )


def _check_room(start: int | jax.Array, num_new: int, room: int) -> None:
    if not isinstance(start, Tracer) and not 0 <= start <= room - num_new:
        raise ValueError(
            f"positions {start}..{start + num_new - 1} have no room: "
            f"the model and the cache hold 0..{room - 1}"
        )
