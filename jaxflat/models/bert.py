"""BERT for masked-token prediction: a post-layer-norm transformer with its published parameters.

Devlin, Chang, Lee, Toutanova (NAACL 2019), with the prediction head of the code they released.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxflat.models.layers import (
    ACTIVATIONS,
    Block,
    embedding,
    normalise,
    padding_mask,
    scan_layers,
    take_positions,
)


class Bert(nn.Module):
    """Masked language model over num_tokens tokens (V, special ones included); the decoder is tied.

    All blocks are scanned: their parameters have a leading axis of layers. Every text is one
    segment, so only the first of the num_types segment embeddings is added.
    """

    num_tokens: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    num_types: int
    epsilon: float  # of every layer norm

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, lengths_B: jax.Array, positions_BxM: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return logits_BxMxV at the positions asked for (all T if None), and intermediates.

        intermediates["features_BxMxD"] is the decoder's input, for probes.
        Raises ValueError if T exceeds max_length.
        """
        length = tokens_BxT.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens exceed the model's {self.max_length} positions")

        tokens_VxD = embedding(self, "token_embedding", self.num_tokens)
        positions_PxD = embedding(self, "position_embedding", self.max_length)
        first_type_1xD = embedding(self, "type_embedding", self.num_types)[:1]
        hidden_BxTxD = tokens_VxD[tokens_BxT] + (positions_PxD[:length] + first_type_1xD)[None]
        norm = {"norm": "layer_norm", "epsilon": self.epsilon}
        hidden_BxTxD = normalise("embedding_norm", hidden_BxTxD, **norm)
        padding_BxT = padding_mask(lengths_B, length)
        block = Block(
            num_heads=self.num_heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            norm_first=False,
            rotary_base=None,
            use_bias=True,
            causal=False,
            **norm,
            name="stack",
        )
        hidden_BxTxD, _ = scan_layers(
            lambda block, h_BxTxD, _: (block(h_BxTxD, padding_BxT)[0], None),
            block,
            self.num_layers,
            hidden_BxTxD,
        )
        if positions_BxM is None:
            hidden_BxMxD = hidden_BxTxD
        else:
            hidden_BxMxD = take_positions(hidden_BxTxD, positions_BxM)
        hidden_BxMxD = nn.Dense(self.width, name="head_dense")(hidden_BxMxD)
        hidden_BxMxD = ACTIVATIONS[self.activation](hidden_BxMxD)
        features_BxMxD = normalise("head_norm", hidden_BxMxD, **norm)
        bias_V = self.param("decoder_bias", nn.initializers.zeros, (self.num_tokens,), jnp.float32)
        logits_BxMxV = features_BxMxD @ tokens_VxD.T + bias_V[None, None, :]
        return logits_BxMxV, {"features_BxMxD": features_BxMxD}
