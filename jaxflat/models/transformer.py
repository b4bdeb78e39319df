"""The transformer that jaxflat trains; it computes only what a masked LM loss needs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxflat.models.layers import (
    Block,
    embedding,
    normalise,
    padding_mask,
    product,
    rematerialised,
    scan_layers,
)

# Rows of the token embedding after the words 0..V-1: pad, mask, CLS.
NUM_SPECIAL_TOKENS = 3
NORM = {"norm": "fast_layer_norm", "epsilon": 1e-6}


class Transformer(nn.Module):
    """Masked language model over words 0..V-1 (V = num_words).

    The first num_layers - 1 blocks are scanned. The last one is separate, because its queries,
    its MLP and the output head run only at the positions asked for.
    """

    num_words: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    tied_decoder: bool
    cls: bool = False  # CLS precedes the words; it and they attend to each other
    remat: bool = False  # derivatives recompute each block's activations
    dtype: Any = None  # of matrix products, as in Block

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, lengths_B: jax.Array, positions_BxM: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return logits_BxMxV at the positions asked for (all T if None), and intermediates.

        intermediates["features_BxMxD"] is the decoder's input, for probes. With `cls` and without
        positions, intermediates["cls_BxD"] is the representation of CLS.
        """
        if self.cls:
            tokens_BxT = jnp.pad(tokens_BxT, ((0, 0), (1, 0)), constant_values=self.num_words + 2)
            lengths_B = lengths_B + 1
            positions_BxM = None if positions_BxM is None else positions_BxM + 1
        tokens_RxD = embedding(self, "token_embedding", self.num_words + NUM_SPECIAL_TOKENS)
        positions_TxD = embedding(self, "position_embedding", self.max_length + self.cls)
        hidden_BxTxD = tokens_RxD[tokens_BxT] + positions_TxD[None, : tokens_BxT.shape[1]]
        block = partial(
            rematerialised(Block) if self.remat else Block,
            num_heads=self.num_heads,
            mlp_width=4 * self.width,
            activation="gelu",
            norm_first=True,
            rotary_base=None,
            use_bias=True,
            causal=False,
            dtype=self.dtype,
            **NORM,
        )
        features_BxMxD = encode(block, self.num_layers, hidden_BxTxD, lengths_B, positions_BxM)
        features = {}
        if self.cls and positions_BxM is None:
            features["cls_BxD"], features_BxMxD = features_BxMxD[:, 0], features_BxMxD[:, 1:]
        logits_BxMxV = decode(self, tokens_RxD, features_BxMxD)
        return logits_BxMxV, {"features_BxMxD": features_BxMxD, **features}


def encode(
    make_block: Callable[..., Any],
    num_layers: int,
    hidden_BxTxD: jax.Array,
    lengths_B: jax.Array,
    positions_BxM: jax.Array | None,
) -> jax.Array:
    """Return features_BxMxD of a compact module: its blocks, the last one separate, and a norm.

    A block maps (hidden_BxTxD, padding_BxT, positions_BxM) to (hidden_BxMxD, anything).
    """
    padding_BxT = padding_mask(lengths_B, hidden_BxTxD.shape[1])
    if num_layers > 1:
        hidden_BxTxD, _ = scan_layers(
            lambda block, h_BxTxD, _: (block(h_BxTxD, padding_BxT, None)[0], None),
            make_block(name="stack"),
            num_layers - 1,
            hidden_BxTxD,
        )
    hidden_BxMxD, _ = make_block(name="last")(hidden_BxTxD, padding_BxT, positions_BxM)
    return normalise("final_norm", hidden_BxMxD, **NORM)


def decode(model: Any, tokens_RxD: jax.Array, features_BxMxD: jax.Array) -> jax.Array:
    """Return logits_BxMxV; a tied decoder is the words' rows of the token embedding."""
    if model.tied_decoder:
        decoder_DxV = tokens_RxD[: model.num_words].T
    else:
        shape = (model.width, model.num_words)
        decoder_DxV = model.param("decoder", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias_V = model.param("decoder_bias", nn.initializers.zeros, (model.num_words,), jnp.float32)
    return product(features_BxMxD, decoder_DxV, model.dtype) + bias_V[None, None, :]
