"""Losses of masked and causal language models, and the excess over the optimum in nats."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

ApplyFn = Callable[..., Any]  # (variables, tokens, lengths, positions) -> (logits, intermediates)
LossFn = Callable[[Any, Any], tuple[jax.Array, jax.Array]]
LogProbsFn = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def masked_lm_loss(apply_fn: ApplyFn) -> LossFn:
    """Return loss_fn(params, batch) -> (loss_sum, weight): cross-entropy in nats, summed.

    batch has inputs_BxT, lengths_B, positions_BxM, targets_BxMxV and weights_BxM. A target is a
    distribution over words: one-hot for sampled labels, the exact conditional for noise-free ones.
    weight is the sum of weights_BxM.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits_BxMxV, _ = apply_fn(
            {"params": params}, batch.inputs_BxT, batch.lengths_B, batch.positions_BxM
        )
        losses_BxM = optax.softmax_cross_entropy(logits_BxMxV, batch.targets_BxMxV)
        weights_BxM = batch.weights_BxM.astype(losses_BxM.dtype)
        return (losses_BxM * weights_BxM).sum(), weights_BxM.sum()

    return loss_fn


def _is_real(batch: Any) -> jax.Array:
    """Return real_BxS: which of the S = T - 1 predicted tokens of each text are not padding."""
    steps_S = jnp.arange(1, batch.tokens_BxT.shape[1], dtype=batch.lengths_B.dtype)
    return steps_S[None, :] < batch.lengths_B[:, None]


def causal_losses(apply_fn: ApplyFn, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Return (losses_B, weights_B): each text's next-token cross-entropies in nats, summed.

    batch has tokens_BxT and lengths_B, the number of real tokens of each text. The first token is
    not predicted. weights_B: the number of predicted tokens of each text.
    """
    logits_BxSxV, _ = apply_fn({"params": params}, batch.tokens_BxT[:, :-1])
    losses_BxS = optax.softmax_cross_entropy_with_integer_labels(
        logits_BxSxV, batch.tokens_BxT[:, 1:]
    )
    real_BxS = _is_real(batch)
    return jnp.where(real_BxS, losses_BxS, 0).sum(1), real_BxS.sum(1).astype(losses_BxS.dtype)


def causal_lm_loss(apply_fn: ApplyFn) -> LossFn:
    """Return loss_fn(params, batch) -> (loss_sum, weight): the sums of `causal_losses` over texts.

    apply_fn: (variables, tokens_BxS) -> (logits_BxSxV of the next tokens, anything).
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        losses_B, weights_B = causal_losses(apply_fn, params, batch)
        return losses_B.sum(), weights_B.sum()

    return loss_fn


def masked_log_probs(apply_fn: ApplyFn) -> LogProbsFn:
    """Return log_probs_fn(params, batch) -> (log_probs_BxMxV, weights_BxM) at masked positions."""

    def log_probs_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits_BxMxV, _ = apply_fn(
            {"params": params}, batch.inputs_BxT, batch.lengths_B, batch.positions_BxM
        )
        log_probs_BxMxV = jax.nn.log_softmax(logits_BxMxV)
        return log_probs_BxMxV, batch.weights_BxM.astype(logits_BxMxV.dtype)

    return log_probs_fn


def word_features(apply_fn: ApplyFn) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """Return features_fn(params, batch) -> (features_BxTxD that probes see, weights_BxT).

    The sentences are the batch's, with their masks. weights_BxT: 1 at words and 0 at padding.
    """

    def features_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        _, outputs = apply_fn({"params": params}, batch.inputs_BxT, batch.lengths_B)
        features_BxTxD = outputs["features_BxMxD"]
        positions_T = jnp.arange(batch.inputs_BxT.shape[1], dtype=batch.lengths_B.dtype)
        words_BxT = positions_T[None, :] < batch.lengths_B[:, None]
        return features_BxTxD, words_BxT.astype(features_BxTxD.dtype)

    return features_fn


def masked_lm_loss_and_log_probs(apply_fn: ApplyFn) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return (params, batch) -> the results of `masked_lm_loss` and of `masked_log_probs`.

    Both share one forward pass.
    """

    def loss_and_log_probs_fn(params: Any, batch: Any) -> tuple[Any, Any]:
        outputs = apply_fn(
            {"params": params}, batch.inputs_BxT, batch.lengths_B, batch.positions_BxM
        )
        same_outputs = lambda *_: outputs  # noqa: E731
        loss = masked_lm_loss(same_outputs)(params, batch)
        return loss, masked_log_probs(same_outputs)(params, batch)

    return loss_and_log_probs_fn


def masked_excess_loss(apply_fn: ApplyFn) -> LossFn:
    """Return excess_loss_fn(params, batch) -> (KL(target || model) in nats, summed; weight).

    With exact conditionals as targets this is the excess over the least possible loss.
    """

    def excess_loss_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        log_probs_BxMxV, weights_BxM = masked_log_probs(apply_fn)(params, batch)
        excess_BxM = optax.losses.kl_divergence(log_probs_BxMxV, batch.targets_BxMxV)
        return (weights_BxM * excess_BxM).sum(), weights_BxM.sum()

    return excess_loss_fn


def causal_log_probs(apply_fn: ApplyFn) -> LogProbsFn:
    """Return log_probs_fn(params, batch) -> (log_probs_BxSxV of the next tokens, weights_BxS)."""

    def log_probs_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits_BxSxV, _ = apply_fn({"params": params}, batch.tokens_BxT[:, :-1])
        real_BxS = _is_real(batch)
        return jax.nn.log_softmax(logits_BxSxV), real_BxS.astype(logits_BxSxV.dtype)

    return log_probs_fn


def self_labelled_loss(log_probs_fn: LogProbsFn) -> LossFn:
    """Return the cross-entropy to the model's own predictions as fixed targets: its entropy.

    Its gradient is 0, and its Hessian is the Gauss-Newton matrix.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        log_probs_xV, weights_x = log_probs_fn(params, batch)
        probs_xV = jnp.exp(jax.lax.stop_gradient(log_probs_xV))
        losses_x = -(probs_xV * log_probs_xV).sum(-1)
        return (losses_x * weights_x).sum(), weights_x.sum()

    return loss_fn


def prediction_losses(
    log_probs_xV: jax.Array, exact_log_probs_xV: jax.Array | None, words_x: jax.Array
) -> dict[str, jax.Array]:
    """Return the losses of predictions in nats, arrays of the shape of words_x.

    "loss" = -log f(x_t), "optimal_loss" = H(p*) and "excess_loss" = KL(p* || f). f is the model,
    and p* the exact conditional of the hidden word x_t given the visible words. E[loss] =
    E[optimal_loss] + E[excess_loss]; the last two have no label noise, and are left out where
    log p* is None. Entries for words_x out of range, such as padding, have no meaning: give them
    weight 0.
    """
    labels_xx1 = jnp.clip(words_x, 0, log_probs_xV.shape[-1] - 1)[..., None]
    losses = {"loss": -jnp.take_along_axis(log_probs_xV, labels_xx1, axis=-1)[..., 0]}
    if exact_log_probs_xV is None:
        return losses
    exact_xV = jnp.exp(exact_log_probs_xV)
    return losses | {
        "optimal_loss": -(exact_xV * exact_log_probs_xV).sum(-1),
        "excess_loss": (exact_xV * (exact_log_probs_xV - log_probs_xV)).sum(-1),
    }
