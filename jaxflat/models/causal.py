"""A decoder-only transformer, as GPT-2, OPT or Llama; jaxflat trains it on sentences and texts."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxflat.models.layers import (
    GATED_ACTIVATIONS,
    Block,
    embedding,
    normalise,
    product,
    rematerialised,
    scan_layers,
    take_positions,
)
from jaxflat.models.transformer import NORM, NUM_SPECIAL_TOKENS

# The parametrisations that jaxflat trains on sentences: those of GPT-2 and of Llama.
BLOCKS: dict[str, dict[str, Any]] = {
    "gpt": {**NORM, "activation": "gelu", "rotary_base": None, "use_bias": True},
    "modern": {
        "norm": "rms_norm",
        "epsilon": 1e-6,
        "activation": "swiglu",
        "rotary_base": 1e4,
        "use_bias": False,
    },
}


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
    """Next-token model over num_tokens tokens, special ones included.

    All blocks are scanned: their parameters have a leading axis of layers. `next_logits` continues
    sequences of any tokens; a call predicts the symbols of whole sentences.
    """

    num_tokens: int
    max_length: int  # of a sequence, start token included
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
    num_outputs: int | None = None  # only the first tokens are predicted; None: all
    tied_decoder: bool = True
    remat: bool = False  # derivatives recompute each block's activations
    dtype: Any = None  # of matrix products, as in Block

    def __call__(
        self, tokens_BxT: jax.Array, lengths_B: jax.Array, positions_BxM: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return logits_BxMxU of predictions of sentences, and intermediates.

        Prediction s names the symbol after s words. The last token, num_tokens - 1, starts every
        sentence. positions_BxM are the predictions asked for, all T + 1 if None. No prediction sees
        a later word, so padding changes none of a sentence's own and lengths_B is not needed.

        intermediates["features_BxMxD"] is the decoder's input, for probes: at the predictions asked
        for, or else after each of the T words. intermediates["start_BxD"] is then the one before
        the first word. Raises ValueError if T + 1 exceeds max_length.
        """
        del lengths_B
        start_token = self.num_tokens - 1
        tokens_BxS = jnp.pad(tokens_BxT, ((0, 0), (1, 0)), constant_values=start_token)
        features_BxSxD, decoder_UxD, _ = self._read(tokens_BxS, None, 0)
        if positions_BxM is None:
            logits_BxSxU = product(features_BxSxD, decoder_UxD.T, self.dtype)
            starts_BxD, features_BxTxD = features_BxSxD[:, 0], features_BxSxD[:, 1:]
            return logits_BxSxU, {"features_BxMxD": features_BxTxD, "start_BxD": starts_BxD}
        features_BxMxD = take_positions(features_BxSxD, positions_BxM)
        logits_BxMxU = product(features_BxMxD, decoder_UxD.T, self.dtype)
        return logits_BxMxU, {"features_BxMxD": features_BxMxD}

    def next_logits(
        self,
        tokens_BxS: jax.Array,
        cache: Cache | None = None,
        start: int | jax.Array = 0,
        token_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Return the logits_BxSxU of the next tokens, and the cache including these S tokens.

        Without a cache the tokens are positions 0..S-1, and the returned cache has S slots. With a
        cache they are positions start..start+S-1 and also see the slots before start. With
        token_ids, there are logits for these tokens only, in this order.
        Raises ValueError if S tokens do not fit; a traced start is not checked.
        """
        features_BxSxD, decoder_UxD, new = self._read(tokens_BxS, cache, start)
        if token_ids is not None:
            decoder_UxD = decoder_UxD[token_ids]
        logits_BxSxU = product(features_BxSxD, decoder_UxD.T, self.dtype)
        if cache is None:
            return logits_BxSxU, new
        start = jnp.asarray(start, jnp.int32)
        return logits_BxSxU, jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 3), cache, new
        )

    @nn.compact
    def _read(
        self, tokens_BxS: jax.Array, cache: Cache | None, start: int | jax.Array
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Return features_BxSxD, the decoder_UxD, and the keys and values of these S tokens."""
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
        # The K keys are the slots, unwritten from start on, and then the new tokens.
        slots_K = jnp.arange(num_slots + num_new, dtype=jnp.int32)
        unwritten_K = (slots_K >= start) & (slots_K < num_slots)
        padding_BxK = jnp.broadcast_to(unwritten_K, (batch_size, len(slots_K)))
        block = rematerialised(Block) if self.remat else Block
        hidden_BxSxD, new = scan_layers(
            lambda block, h_BxSxD, cached: block(h_BxSxD, padding_BxK, None, cached, start),
            block(
                num_heads=self.num_heads,
                mlp_width=self.mlp_width,
                activation=self.activation,
                norm_first=self.norm_first,
                rotary_base=self.rotary_base,
                causal=True,
                dtype=self.dtype,
                **norm,
                name="stack",
            ),
            self.num_layers,
            hidden_BxSxD,
            cache,
        )
        if self.norm_first:
            hidden_BxSxD = normalise("final_norm", hidden_BxSxD, **norm)
        if self.tied_decoder:
            return hidden_BxSxD, tokens_VxD[: self.num_outputs], Cache(*new)
        shape = (self.width, self.num_outputs or self.num_tokens)
        decoder_DxU = self.param("decoder", nn.initializers.lecun_normal(), shape, jnp.float32)
        return hidden_BxSxD, decoder_DxU.T, Cache(*new)


def make_sentence_model(
    num_words: int,
    max_length: int,
    *,
    block: str,
    width: int,
    num_layers: int,
    head_size: int,
    tied_decoder: bool,
) -> CausalTransformer:
    """Return a model of sentences of up to max_length words 0..V-1 (V = num_words).

    Its U = V + 1 outputs are the words and V, which stops a sentence. block: a key of BLOCKS.
    """
    gated = BLOCKS[block]["activation"] in GATED_ACTIVATIONS
    return CausalTransformer(
        num_tokens=num_words + NUM_SPECIAL_TOKENS,
        max_length=max_length + 1,
        width=width,
        num_layers=num_layers,
        num_heads=width // head_size,
        mlp_width=gated_mlp_width(width) if gated else 4 * width,
        num_outputs=num_words + 1,
        tied_decoder=tied_decoder,
        **BLOCKS[block],
    )


def gated_mlp_width(width: int) -> int:
    """Return 8/3 of the width, rounded down to a multiple of 8.

    With a third matrix, the MLP then has as many parameters as one of 4 times the width (Shazeer,
    2020). Rounded down, k times the width of an MLP fits in the MLP of a model k times as wide.
    """
    return 8 * (width // 3)


def _check_room(start: int | jax.Array, num_new: int, room: int) -> None:
    if not isinstance(start, Tracer) and not 0 <= start <= room - num_new:
        raise ValueError(
            f"positions {start}..{start + num_new - 1} do not fit: "
            f"the model and the cache have positions 0..{room - 1}"
        )
