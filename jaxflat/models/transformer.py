"""A BERT-style pre-layer-norm transformer that computes only what a masked-LM loss needs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Rows of the token embedding beyond the words 0..V-1: pad, mask, CLS.
NUM_SPECIAL_TOKENS = 3


def layer_norm(name: str, x: jax.Array) -> jax.Array:
    """Normalise the last axis in x's own precision; Linen's default cannot take float64 here.

    Derivatives recompute it, and the GELU below, from its input: less to store, and quicker.
    """
    recomputed = nn.remat(nn.LayerNorm, prevent_cse=False)
    return recomputed(name=name, param_dtype=x.dtype, force_float32_reductions=False)(x)


class Projections(nn.Module):
    """Queries, keys and values by one matrix product, or by two where queries are fewer."""

    @nn.compact
    def __call__(
        self, queries_BxMxD: jax.Array, keys_BxTxD: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        width = keys_BxTxD.shape[-1]
        initializer = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        kernel_Dx3xD = self.param("kernel", initializer, (width, 3, width), jnp.float32)
        bias_3xD = self.param("bias", nn.initializers.zeros, (3, width), jnp.float32)

        def project(x_BxLxD: jax.Array, parts: slice) -> list[jax.Array]:
            kernel_DxF = kernel_Dx3xD[:, parts].reshape(width, -1)
            flat_RxF = x_BxLxD.reshape(-1, width) @ kernel_DxF + bias_3xD[parts].reshape(1, -1)
            flat_RxCxD = flat_RxF.reshape(*x_BxLxD.shape[:-1], -1, width)
            return [flat_RxCxD[..., c, :] for c in range(flat_RxCxD.shape[-2])]

        if queries_BxMxD is keys_BxTxD:
            queries, keys, values = project(keys_BxTxD, slice(0, 3))
        else:
            (queries,) = project(queries_BxMxD, slice(0, 1))
            keys, values = project(keys_BxTxD, slice(1, 3))
        return queries, keys, values


class Attention(nn.Module):
    """Multi-head attention from M query positions to all T positions.

    Batch and heads share one axis N = B * H in the core, which keeps each matrix product 3-D.
    """

    num_heads: int

    @nn.compact
    def __call__(
        self, queries_BxMxD: jax.Array, keys_BxTxD: jax.Array, padding_BxT: jax.Array
    ) -> jax.Array:
        width = keys_BxTxD.shape[-1]
        head_size = width // self.num_heads

        def split_heads(x_BxLxD: jax.Array) -> jax.Array:
            x_BxLxHxE = x_BxLxD.reshape(*x_BxLxD.shape[:2], self.num_heads, head_size)
            return x_BxLxHxE.swapaxes(1, 2).reshape(-1, x_BxLxD.shape[1], head_size)

        projected = Projections(name="qkv")(queries_BxMxD, keys_BxTxD)
        q_NxMxE, k_NxTxE, v_NxTxE = (split_heads(x) for x in projected)
        scores_NxMxT = jnp.einsum("nme,nte->nmt", q_NxMxE / head_size**0.5, k_NxTxE)
        padding_Nx1xT = jnp.repeat(padding_BxT, self.num_heads, axis=0)[:, None, :]
        lowest = jnp.finfo(scores_NxMxT.dtype).min
        weights_NxMxT = jax.nn.softmax(jnp.where(padding_Nx1xT, lowest, scores_NxMxT))
        mixed_NxMxE = jnp.einsum("nmt,nte->nme", weights_NxMxT, v_NxTxE)
        mixed_BxHxMxE = mixed_NxMxE.reshape(-1, self.num_heads, *mixed_NxMxE.shape[1:])
        mixed_BxMxD = mixed_BxHxMxE.swapaxes(1, 2).reshape(queries_BxMxD.shape)
        return nn.Dense(width, name="out")(mixed_BxMxD)


class Block(nn.Module):
    """h += Attention(norm(h)); h += MLP(norm(h)), for the M positions asked for."""

    num_heads: int

    @nn.compact
    def __call__(
        self, hidden_BxTxD: jax.Array, padding_BxT: jax.Array, positions_BxM: jax.Array | None
    ) -> jax.Array:
        width = hidden_BxTxD.shape[-1]
        normed_BxTxD = layer_norm("attention_norm", hidden_BxTxD)
        if positions_BxM is None:
            hidden_BxMxD, queries_BxMxD = hidden_BxTxD, normed_BxTxD
        else:
            hidden_BxMxD = take_positions(hidden_BxTxD, positions_BxM)
            queries_BxMxD = take_positions(normed_BxTxD, positions_BxM)
        attention = Attention(self.num_heads, name="attention")
        hidden_BxMxD += attention(queries_BxMxD, normed_BxTxD, padding_BxT)
        inner_BxMxF = nn.Dense(4 * width, name="mlp_in")(layer_norm("mlp_norm", hidden_BxMxD))
        outer_BxMxF = jax.checkpoint(nn.gelu, prevent_cse=False)(inner_BxMxF)
        return hidden_BxMxD + nn.Dense(width, name="mlp_out")(outer_BxMxF)


class Transformer(nn.Module):
    """Masked language model over words 0..V-1 (V = num_words).

    The first num_layers - 1 blocks are scanned; the last one stands apart because its queries,
    its MLP and the output head run only at the positions asked for.
    """

    num_words: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    tied_decoder: bool
    cls: bool = False  # CLS before the words, seen by them and seeing them

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, lengths_B: jax.Array, positions_BxM: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return logits_BxMxV at the positions asked for (all T where None), and intermediates.

        intermediates["features_BxMxD"]: the representations under the decoder, for probes; with
        `cls` and without positions also ["cls_BxD"], that of CLS.
        """
        if self.cls:
            tokens_BxT = jnp.pad(tokens_BxT, ((0, 0), (1, 0)), constant_values=self.num_words + 2)
            lengths_B = lengths_B + 1
            positions_BxM = None if positions_BxM is None else positions_BxM + 1
        tokens_RxD = embedding(self, "token_embedding", self.num_words + NUM_SPECIAL_TOKENS)
        positions_TxD = embedding(self, "position_embedding", self.max_length + self.cls)
        hidden_BxTxD = tokens_RxD[tokens_BxT] + positions_TxD[None, : tokens_BxT.shape[1]]
        block = partial(Block, self.num_heads)
        hidden_BxMxD = run_blocks(block, self.num_layers, hidden_BxTxD, lengths_B, positions_BxM)
        features_BxMxD = layer_norm("final_norm", hidden_BxMxD)
        features = {}
        if self.cls and positions_BxM is None:
            features["cls_BxD"], features_BxMxD = features_BxMxD[:, 0], features_BxMxD[:, 1:]
        logits_BxMxV = decode(self, tokens_RxD, features_BxMxD)
        return logits_BxMxV, {"features_BxMxD": features_BxMxD, **features}


def embedding(model: Any, name: str, num_rows: int) -> jax.Array:
    """Return a table of embeddings of a model, RxD; for its compact __call__, as what follows."""
    shape = (num_rows, model.width)
    return model.param(name, nn.initializers.normal(model.width**-0.5), shape, jnp.float32)


def run_blocks(
    make_block: Callable[..., Any],
    num_layers: int,
    hidden_BxTxD: jax.Array,
    lengths_B: jax.Array,
    positions_BxM: jax.Array | None,
) -> jax.Array:
    """Return hidden_BxMxD after all blocks, of which the last one stands apart."""
    times_T = jnp.arange(hidden_BxTxD.shape[1], dtype=lengths_B.dtype)
    padding_BxT = times_T[None, :] >= lengths_B[:, None]
    if num_layers > 1:
        stack = nn.scan(
            lambda block, h_BxTxD, _: (block(h_BxTxD, padding_BxT, None), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=num_layers - 1,
        )
        hidden_BxTxD, _ = stack(make_block(name="stack"), hidden_BxTxD, None)
    return make_block(name="last")(hidden_BxTxD, padding_BxT, positions_BxM)


def decode(model: Any, tokens_RxD: jax.Array, features_BxMxD: jax.Array) -> jax.Array:
    """Return logits_BxMxV; a tied decoder is the embeddings of the words."""
    if model.tied_decoder:
        decoder_DxV = tokens_RxD[: model.num_words].T
    else:
        shape = (model.width, model.num_words)
        decoder_DxV = model.param("decoder", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias_V = model.param("decoder_bias", nn.initializers.zeros, (model.num_words,), jnp.float32)
    return features_BxMxD @ decoder_DxV + bias_V[None, None, :]


def take_positions(x_BxTxD: jax.Array, positions_BxM: jax.Array) -> jax.Array:
    """Return x_BxMxD, the rows of x at each sentence's own positions."""
    return jnp.take_along_axis(x_BxTxD, positions_BxM[:, :, None], axis=1)
