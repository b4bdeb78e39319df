"""BERT for masked-token prediction: a post-layer-norm transformer with its published parameters.

Devlin, Chang, Lee, Toutanova (NAACL 2019), with the prediction head of the code they released.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxflat.models.causal import ACTIVATIONS, layer_norm
from jaxflat.models.transformer import Attention, embedding, take_positions


class BertBlock(nn.Module):
    """h = norm(h + Attention(h)); h = norm(h + MLP(h))."""

    num_heads: int
    mlp_width: int
    activation: str
    epsilon: float

    @nn.compact
    def __call__(self, hidden_BxTxD: jax.Array, padding_BxT: jax.Array) -> jax.Array:
        attention = Attention(self.num_heads, name="attention")
        hidden_BxTxD += attention(hidden_BxTxD, hidden_BxTxD, padding_BxT)
        hidden_BxTxD = layer_norm("attention_norm", hidden_BxTxD, self.epsilon)
        inner_BxTxF = ACTIVATIONS[self.activation](
            nn.Dense(self.mlp_width, name="mlp_in")(hidden_BxTxD)
        )
        hidden_BxTxD += nn.Dense(hidden_BxTxD.shape[-1], name="mlp_out")(inner_BxTxF)
        return layer_norm("mlp_norm", hidden_BxTxD, self.epsilon)


class Bert(nn.Module):
    """Masked language model over num_tokens tokens (V, special ones included); the decoder is tied.

    All blocks are scanned: their parameters have a leading axis of layers. Every text is one
    segment, so that of the num_types segment embeddings only that of type 0 is ever added.
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
        """Return logits_BxMxV at the positions asked for (all T where None), and intermediates.

        intermediates["features_BxMxD"]: the representations under the decoder, for probes.
        Raises ValueError where T exceeds max_length.
        """
        length = tokens_BxT.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens exceed the model's {self.max_length} positions")

        tokens_VxD = embedding(self, "token_embedding", self.num_tokens)
        positions_PxD = embedding(self, "position_embedding", self.max_length)
        first_type_1xD = embedding(self, "type_embedding", self.num_types)[:1]
        hidden_BxTxD = tokens_VxD[tokens_BxT] + (positions_PxD[:length] + first_type_1xD)[None]
        hidden_BxTxD = layer_norm("embedding_norm", hidden_BxTxD, self.epsilon)
        padding_BxT = jnp.arange(length, dtype=lengths_B.dtype)[None, :] >= lengths_B[:, None]
        stack = nn.scan(
            lambda block, h_BxTxD, _: (block(h_BxTxD, padding_BxT), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        sizes = (self.num_heads, self.mlp_width, self.activation, self.epsilon)
        hidden_BxTxD, _ = stack(BertBlock(*sizes, name="stack"), hidden_BxTxD, None)
        if positions_BxM is None:
            hidden_BxMxD = hidden_BxTxD
        else:
            hidden_BxMxD = take_positions(hidden_BxTxD, positions_BxM)
        hidden_BxMxD = nn.Dense(self.width, name="head_dense")(hidden_BxMxD)
        hidden_BxMxD = ACTIVATIONS[self.activation](hidden_BxMxD)
        features_BxMxD = layer_norm("head_norm", hidden_BxMxD, self.epsilon)
        bias_V = self.param("decoder_bias", nn.initializers.zeros, (self.num_tokens,), jnp.float32)
        logits_BxMxV = features_BxMxD @ tokens_VxD.T + bias_V[None, None, :]
        return logits_BxMxV, {"features_BxMxD": features_BxMxD}
