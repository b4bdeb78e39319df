"""A bidirectional LSTM that predicts masked words; it computes only what the loss needs."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxflat.models.layers import embedding, normalise, product, rematerialised, take_positions
from jaxflat.models.transformer import NORM, NUM_SPECIAL_TOKENS, decode, encode

State = tuple[jax.Array, jax.Array]  # cell_BxE and output_BxE


def _bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Return ones for the forget gate (Jozefowicz et al., 2015), zeros for the other gates."""
    del key
    return jnp.zeros(shape, dtype).at[1].set(1)


class Direction(nn.Module):
    """The parameters of one direction; the gates i, f, g, o are one axis of each array.

    One matrix product multiplies all words by the input kernel before the scan over time. Linen's
    cells instead multiply word by word within the scan, with one kernel a gate, and keep float32
    states even for float64 parameters.
    """

    dtype: Any  # of the product

    @nn.compact
    def __call__(self, x_TxBxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the words' input to the gates, TxBxG with G = 4E, and the recurrent ExG."""
        width = x_TxBxD.shape[-1]
        initializer = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        shape = (width, 4, width)
        input_Dx4xE = self.param("input_kernel", initializer, shape, jnp.float32)
        recurrent_Ex4xE = self.param("recurrent_kernel", initializer, shape, jnp.float32)
        bias_4xE = self.param("bias", _bias, (4, width), jnp.float32)
        kernel_DxG = input_Dx4xE.reshape(width, -1)
        flat_RxG = product(x_TxBxD.reshape(-1, width), kernel_DxG, self.dtype)
        flat_RxG += bias_4xE.reshape(1, -1)
        return flat_RxG.reshape(*x_TxBxD.shape[:2], -1), recurrent_Ex4xE.reshape(width, -1)


def _next_state(state: State, words_BxG: jax.Array, recurrent_ExG: jax.Array, dtype: Any) -> State:
    """c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(c')."""
    cell_BxE, output_BxE = state
    gates_BxG = words_BxG + product(output_BxE, recurrent_ExG, dtype)
    i, f, g, o = jnp.split(gates_BxG, 4, axis=-1)
    cell_BxE = jax.nn.sigmoid(f) * cell_BxE + jax.nn.sigmoid(i) * jnp.tanh(g)
    return cell_BxE, jax.nn.sigmoid(o) * jnp.tanh(cell_BxE)


def read_both_ways(
    forward: tuple[jax.Array, jax.Array],
    backward: tuple[jax.Array, jax.Array],
    padding_BxT: jax.Array,
    dtype: Any,
) -> jax.Array:
    """Return the outputs TxBx2E of two LSTMs: one reads from the first word, one from the last.

    forward and backward: the output of a Direction each. Recurrent products have the dtype.
    """
    (forward_TxBxG, forward_ExG), (backward_TxBxG, backward_ExG) = forward, backward
    padding_TxBx1 = padding_BxT.T[:, :, None]
    zeros_BxE = jnp.zeros_like(forward_TxBxG[0, :, : forward_ExG.shape[0]])
    initial = (zeros_BxE, zeros_BxE)

    def step(states: tuple[State, State], words: tuple[jax.Array, ...]):
        forward_BxG, backward_BxG, padding_Bx1 = words
        forward = _next_state(states[0], forward_BxG, forward_ExG, dtype)
        cell_BxE, output_BxE = _next_state(states[1], backward_BxG, backward_ExG, dtype)
        # The backward state stays zero until the last word of its sentence.
        cell_BxE = jnp.where(padding_Bx1, 0, cell_BxE)
        output_BxE = jnp.where(padding_Bx1, 0, output_BxE)
        return (forward, (cell_BxE, output_BxE)), (forward[1], output_BxE)

    # One scan runs both directions: its step t reads position t forward, T - 1 - t backward.
    words = (forward_TxBxG, backward_TxBxG[::-1], padding_TxBx1[::-1])
    _, (forward_TxBxE, backward_TxBxE) = jax.lax.scan(step, (initial, initial), words)
    return jnp.concatenate([forward_TxBxE, backward_TxBxE[::-1]], axis=-1)


class Join(nn.Module):
    """Map both directions' outputs to the hidden state, with one ExD kernel for each direction."""

    dtype: Any  # of the product

    @nn.compact
    def __call__(self, read_BxMx2E: jax.Array) -> jax.Array:
        width = read_BxMx2E.shape[-1] // 2
        initializer = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        kernel_2xExD = self.param("kernel", initializer, (2, width, width), jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        kernel_FxD = kernel_2xExD.reshape(-1, width)
        return product(read_BxMx2E, kernel_FxD, self.dtype) + bias_D[None, None, :]


class LstmBlock(nn.Module):
    """h += Join(forward(norm(h)), backward(norm(h))), at the M positions asked for."""

    dtype: Any = None  # of matrix products; None: the input's

    @nn.compact
    def __call__(
        self, hidden_BxTxD: jax.Array, padding_BxT: jax.Array, positions_BxM: jax.Array | None
    ) -> tuple[jax.Array, None]:
        """Return hidden_BxMxD at the positions asked for (all T if None); nothing to cache."""
        x_TxBxD = normalise("norm", hidden_BxTxD, **NORM).swapaxes(0, 1)
        forward = Direction(self.dtype, name="forward")(x_TxBxD)
        backward = Direction(self.dtype, name="backward")(x_TxBxD)
        read_BxMx2E = read_both_ways(forward, backward, padding_BxT, self.dtype).swapaxes(0, 1)
        if positions_BxM is not None:
            hidden_BxTxD = take_positions(hidden_BxTxD, positions_BxM)
            read_BxMx2E = take_positions(read_BxMx2E, positions_BxM)
        return hidden_BxTxD + Join(self.dtype, name="join")(read_BxMx2E), None


class Lstm(nn.Module):
    """Masked language model over words 0..V-1 (V = num_words), with Transformer's interface.

    Blocks are residual and normalise their input, as the transformer's, so a block of zeros is the
    identity. The first num_layers - 1 blocks are scanned. The last one is separate, because it
    joins its directions, and the head runs, only at the positions asked for.
    """

    num_words: int
    width: int  # of the hidden state, and of each direction
    num_layers: int
    tied_decoder: bool
    remat: bool = False  # derivatives recompute each block's activations
    dtype: Any = None  # of matrix products; None: the parameters'

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, lengths_B: jax.Array, positions_BxM: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return logits_BxMxV at the positions asked for (all T if None), and intermediates.

        intermediates["features_BxMxD"] is the decoder's input, for probes.
        """
        tokens_RxD = embedding(self, "token_embedding", self.num_words + NUM_SPECIAL_TOKENS)
        hidden_BxTxD = tokens_RxD[tokens_BxT]
        block = partial(rematerialised(LstmBlock) if self.remat else LstmBlock, dtype=self.dtype)
        features_BxMxD = encode(block, self.num_layers, hidden_BxTxD, lengths_B, positions_BxM)
        return decode(self, tokens_RxD, features_BxMxD), {"features_BxMxD": features_BxMxD}
