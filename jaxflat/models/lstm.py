"""A bidirectional LSTM that predicts masked words; it computes only what such a loss needs."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxflat.models.transformer import (
    NUM_SPECIAL_TOKENS,
    decode,
    embedding,
    layer_norm,
    run_blocks,
    take_positions,
)

State = tuple[jax.Array, jax.Array]  # cell_BxE and output_BxE


def _bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Return zeros but for the forget gate, which starts open at 1 (Jozefowicz et al. 2015)."""
    del key
    return jnp.zeros(shape, dtype).at[1].set(1)


class Direction(nn.Module):
    """The parameters of one direction: gates i, f, g, o are an axis of their own.

    Linen's own cells keep a kernel for each gate and read the words one by one, inside of the
    scan over time; their states are float32 whatever the parameters are. Here all words meet the
    input kernels in one matrix product before the scan.
    """

    @nn.compact
    def __call__(self, x_TxBxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return what the words add to the gates, TxBxG with G = 4E, and the recurrent ExG."""
        width = x_TxBxD.shape[-1]
        initializer = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        shape = (width, 4, width)
        input_Dx4xE = self.param("input_kernel", initializer, shape, jnp.float32)
        recurrent_Ex4xE = self.param("recurrent_kernel", initializer, shape, jnp.float32)
        bias_4xE = self.param("bias", _bias, (4, width), jnp.float32)
        flat_RxG = x_TxBxD.reshape(-1, width) @ input_Dx4xE.reshape(width, -1)
        flat_RxG += bias_4xE.reshape(1, -1)
        return flat_RxG.reshape(*x_TxBxD.shape[:2], -1), recurrent_Ex4xE.reshape(width, -1)


def _next_state(state: State, words_BxG: jax.Array, recurrent_ExG: jax.Array) -> State:
    """c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(c')."""
    cell_BxE, output_BxE = state
    i, f, g, o = jnp.split(words_BxG + output_BxE @ recurrent_ExG, 4, axis=-1)
    cell_BxE = jax.nn.sigmoid(f) * cell_BxE + jax.nn.sigmoid(i) * jnp.tanh(g)
    return cell_BxE, jax.nn.sigmoid(o) * jnp.tanh(cell_BxE)


def read_both_ways(
    forward: tuple[jax.Array, jax.Array],
    backward: tuple[jax.Array, jax.Array],
    padding_BxT: jax.Array,
) -> jax.Array:
    """Return the outputs of two LSTMs, one from the first word on, one from the last: TxBx2E.

    Each is given as what a Direction returns.
    """
    (forward_TxBxG, forward_ExG), (backward_TxBxG, backward_ExG) = forward, backward
    padding_TxBx1 = padding_BxT.T[:, :, None]
    zeros_BxE = jnp.zeros_like(forward_TxBxG[0, :, : forward_ExG.shape[0]])
    at_rest = (zeros_BxE, zeros_BxE)

    def step(states: tuple[State, State], words: tuple[jax.Array, ...]):
        forward_BxG, backward_BxG, padding_Bx1 = words
        forward = _next_state(states[0], forward_BxG, forward_ExG)
        cell_BxE, output_BxE = _next_state(states[1], backward_BxG, backward_ExG)
        # The way back stays at rest until it comes to its sentence's own last word.
        cell_BxE = jnp.where(padding_Bx1, 0, cell_BxE)
        output_BxE = jnp.where(padding_Bx1, 0, output_BxE)
        return (forward, (cell_BxE, output_BxE)), (forward[1], output_BxE)

    # Both directions in one scan: position t of the one meets position T - 1 - t of the other.
    words = (forward_TxBxG, backward_TxBxG[::-1], padding_TxBx1[::-1])
    _, (forward_TxBxE, backward_TxBxE) = jax.lax.scan(step, (at_rest, at_rest), words)
    return jnp.concatenate([forward_TxBxE, backward_TxBxE[::-1]], axis=-1)


class Join(nn.Module):
    """What both directions add to the hidden state; each has a kernel of its own, ExD."""

    @nn.compact
    def __call__(self, read_BxMx2E: jax.Array) -> jax.Array:
        width = read_BxMx2E.shape[-1] // 2
        initializer = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        kernel_2xExD = self.param("kernel", initializer, (2, width, width), jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        return read_BxMx2E @ kernel_2xExD.reshape(-1, width) + bias_D[None, None, :]


class LstmBlock(nn.Module):
    """h += Join(forward(norm(h)), backward(norm(h))), at the M positions asked for."""

    @nn.compact
    def __call__(
        self, hidden_BxTxD: jax.Array, padding_BxT: jax.Array, positions_BxM: jax.Array | None
    ) -> jax.Array:
        x_TxBxD = layer_norm("norm", hidden_BxTxD).swapaxes(0, 1)
        directions = Direction(name="forward")(x_TxBxD), Direction(name="backward")(x_TxBxD)
        read_BxMx2E = read_both_ways(*directions, padding_BxT).swapaxes(0, 1)
        if positions_BxM is not None:
            hidden_BxTxD = take_positions(hidden_BxTxD, positions_BxM)
            read_BxMx2E = take_positions(read_BxMx2E, positions_BxM)
        return hidden_BxTxD + Join(name="join")(read_BxMx2E)


class Lstm(nn.Module):
    """Masked language model over words 0..V-1 (V = num_words), with Transformer's interface.

    Blocks are residual and normalise what they read, as the transformer's do: so a block of zeros
    is the identity. The first num_layers - 1 are scanned, the last one stands apart because it
    joins its directions, and the head runs, only at the positions asked for.
    """

    num_words: int
    width: int  # of the hidden state, and of each direction
    num_layers: int
    tied_decoder: bool

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, lengths_B: jax.Array, positions_BxM: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return logits_BxMxV at the positions asked for (all T where None), and intermediates.

        intermediates["features_BxMxD"]: the representations under the decoder, for probes.
        """
        tokens_RxD = embedding(self, "token_embedding", self.num_words + NUM_SPECIAL_TOKENS)
        blocks = (LstmBlock, self.num_layers, tokens_RxD[tokens_BxT])
        features_BxMxD = layer_norm("final_norm", run_blocks(*blocks, lengths_B, positions_BxM))
        return decode(self, tokens_RxD, features_BxMxD), {"features_BxMxD": features_BxMxD}
