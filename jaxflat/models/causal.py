"""A decoder-only transformer; its defaults are the parametrisation of GPT-2 and OPT."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxflat.models.layers import Block, embedding, normalise, scan_layers


class Cache(NamedTuple):
    """Keys and values of T slots in all L layers; slot t is position t."""

    keys_LxBxHxTxE: jax.Array
    values_LxBxHxTxE: jax.Array


def empty_cache(model: "CausalTransformer", batch_size: int, length: int, dtype: Any) -> Cache:
    """Return a cache of zeros for `length` positions; dtype is the parameters'."""
    head_size = model.width // model.num_heads
    shape = (model.num_layers, batch_size, model.num_heads, length, head_size)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


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
    norm: str = "layer_norm"
    epsilon: float = 1e-5  # of every norm
    norm_first: bool = True  # and a final norm under the decoder
    rotary_base: float | None = None  # None: a learned embedding of each position
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        tokens_BxS: jax.Array,
        cache: Cache | None = None,
        start: int | jax.Array = 0,
        token_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Return the logits_BxSxV of the next tokens, and the cache including these S tokens.

        Without a cache the tokens are positions 0..S-1, and the returned cache has S slots. With a
        cache they are positions start..start+S-1 and also see the slots before start. With
        token_ids, there are logits for these tokens only, in this order.
        Raises ValueError if S tokens do not fit; a traced start is not checked.
        """
        batch_size, num_new = tokens_BxS.shape
        num_slots = 0 if cache is None else cache.keys_LxBxHxTxE.shape[3]
        _check_room(start, num_new, min(num_new if cache is None else num_slots, self.max_length))
        start = jnp.asarray(start, jnp.int32)
        norm = {"norm": self.norm, "epsilon": self.epsilon, "use_bias": self.use_bias}

        tokens_VxD = embedding(self, "token_embedding", self.num_tokens)
        hidden_BxSxD = tokens_VxD[tokens_BxS]
        if self.rotary_base is None:
            positions_PxD = embedding(self, "position_embedding", self.max_length)
            positions_S = start + jnp.arange(num_new, dtype=jnp.int32)
            hidden_BxSxD += positions_PxD[positions_S][None]
        # The U keys are the slots, unwritten from start on, and then the new tokens.
        slots_U = jnp.arange(num_slots + num_new, dtype=jnp.int32)
        unwritten_U = (slots_U >= start) & (slots_U < num_slots)
        padding_BxU = jnp.broadcast_to(unwritten_U, (batch_size, len(slots_U)))
        hidden_BxSxD, new = scan_layers(
            lambda block, h_BxSxD, cached: block(h_BxSxD, padding_BxU, None, cached, start),
            Block(
                num_heads=self.num_heads,
                mlp_width=self.mlp_width,
                activation=self.activation,
                norm_first=self.norm_first,
                rotary_base=self.rotary_base,
                causal=True,
                **norm,
                name="stack",
            ),
            self.num_layers,
            hidden_BxSxD,
            cache,
        )
        if self.norm_first:
            hidden_BxSxD = normalise("final_norm", hidden_BxSxD, **norm)
        decoder_VxD = tokens_VxD if token_ids is None else tokens_VxD[token_ids]
        logits_BxSxV = hidden_BxSxD @ decoder_VxD.T
        if cache is None:
            return logits_BxSxV, Cache(*new)
        return logits_BxSxV, jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 3), cache, Cache(*new)
        )


def _check_room(start: int | jax.Array, num_new: int, room: int) -> None:
    if not isinstance(start, Tracer) and not 0 <= start <= room - num_new:
        raise ValueError(
            f"positions {start}..{start + num_new - 1} do not fit: "
            f"the model and the cache have positions 0..{room - 1}"
        )
