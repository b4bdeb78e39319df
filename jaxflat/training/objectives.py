"""What a masked language model is trained on, and how far from the optimum it is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

ApplyFn = Callable[..., Any]  # (variables, tokens, lengths, positions) -> (logits, intermediates)
LossFn = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def masked_lm_loss(apply_fn: ApplyFn) -> LossFn:
    """Return loss_fn(params, batch) -> (loss_sum, weight): cross-entropy in nats, summed.

    batch has inputs_BxT, lengths_B, positions_BxM and targets_BxMxV (a distribution over words:
    one-hot for sampled labels, the exact conditional for noise-free ones); weight = B * M.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits_BxMxV, _ = apply_fn(
            {"params": params}, batch.inputs_BxT, batch.lengths_B, batch.positions_BxM
        )
        losses_BxM = optax.softmax_cross_entropy(logits_BxMxV, batch.targets_BxMxV)
        return losses_BxM.sum(), jnp.asarray(losses_BxM.size, losses_BxM.dtype)

    return loss_fn


def masked_log_probs(apply_fn: ApplyFn) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """Return log_probs_fn(params, batch) -> (log_probs_BxMxV, weights_BxM) at masked positions."""

    def log_probs_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits_BxMxV, _ = apply_fn(
            {"params": params}, batch.inputs_BxT, batch.lengths_B, batch.positions_BxM
        )
        log_probs_BxMxV = jax.nn.log_softmax(logits_BxMxV)
        return log_probs_BxMxV, jnp.ones(logits_BxMxV.shape[:2], logits_BxMxV.dtype)

    return log_probs_fn


def masked_conditionals(
    apply_fn: ApplyFn, params: Any, masked_BxTxT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """Return the model's log p(x_t | the other words), BxTxV nats, for every position t.

    masked_BxTxT[b, t] is sentence b with position t masked.
    """
    num_sentences, length, _ = masked_BxTxT.shape
    logits_Rx1xV, _ = apply_fn(
        {"params": params},
        masked_BxTxT.reshape(-1, length),
        jnp.repeat(lengths_B, length),
        jnp.tile(jnp.arange(length), num_sentences)[:, None],
    )
    return jax.nn.log_softmax(logits_Rx1xV).reshape(num_sentences, length, -1)


def sentence_losses(
    log_probs_BxTxV: jax.Array,
    exact_log_probs_BxTxV: jax.Array,
    tokens_BxT: jax.Array,
    lengths_B: jax.Array,
) -> dict[str, jax.Array]:
    """Return each sentence's losses in nats, each the mean over its words, masked one at a time.

    Gives arrays of shape (B,): "loss" = -log f(x_t), "optimal_loss" = H(p*) and "excess_loss" =
    KL(p* || f), with f the model and p* the exact conditional of x_t given the other words.
    E[loss] = E[optimal_loss] + E[excess_loss], and the last two are free of label noise.
    """
    length, num_words = log_probs_BxTxV.shape[1:]
    exact_BxTxV = jnp.exp(exact_log_probs_BxTxV)
    labels_BxTx1 = jnp.minimum(tokens_BxT, num_words - 1)[:, :, None]
    losses_BxT = {
        "loss": -jnp.take_along_axis(log_probs_BxTxV, labels_BxTx1, axis=-1)[..., 0],
        "optimal_loss": -(exact_BxTxV * exact_log_probs_BxTxV).sum(-1),
        "excess_loss": (exact_BxTxV * (exact_log_probs_BxTxV - log_probs_BxTxV)).sum(-1),
    }
    words_BxT = jnp.arange(length)[None, :] < lengths_B[:, None]
    dtype = log_probs_BxTxV.dtype
    weights_BxT = words_BxT.astype(dtype) / lengths_B[:, None].astype(dtype)
    return {name: (value * weights_BxT).sum(-1) for name, value in losses_BxT.items()}
