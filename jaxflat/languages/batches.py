"""What a masked language model is asked: batches to train on, questions to evaluate by."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.masking import mask_each, mask_id, mask_one, mask_share
from jaxflat.languages.sentences import Sentences

EVALUATED_MASKS = 4  # of each evaluation sentence, where several words are masked


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskedBatch:
    """Sentences with hidden words, and what is to be predicted there.

    targets_BxMxV: a distribution over words for each of the positions_BxM. weights_BxM: 1, or 0
    where a sentence has fewer hidden words than M.
    """

    inputs_BxT: Array
    lengths_B: Array
    positions_BxM: Array
    targets_BxMxV: Array
    weights_BxM: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Questions:
    """R masked copies of each of S sentences, with the hidden words and their exact conditionals.

    log_probs_SxRxMxV in nats; weights_SxRxM say how much each prediction counts.
    """

    inputs_SxRxT: Array
    lengths_S: Array
    positions_SxRxM: Array
    weights_SxRxM: Array
    words_SxRxM: Array
    log_probs_SxRxMxV: Array


class Source(NamedTuple):
    """What training sentences come from: the language, or (SxBxT) stored ones of S steps."""

    language: Any
    stored: Sentences | None = None


def source_batch(
    source: Source, key: Array, step: Array, batch_size: int, targets: str, masking: str
) -> MaskedBatch:
    """Mask new sentences, or those stored for a step (from 0), see `mask_batch`."""
    if source.stored is None:
        return masked_batch(source.language, key, batch_size, targets, masking)
    sentences = jax.tree.map(lambda x: x[step], source.stored)
    return mask_batch(source.language, jax.random.split(key)[1], sentences, targets, masking)


def masked_batch(
    language: Any, key: Array, batch_size: int, targets: str, masking: str = "one"
) -> MaskedBatch:
    """Sample sentences and mask them, see `mask_batch`."""
    sentence_key, mask_key = jax.random.split(key)
    sentences = language.sample(sentence_key, batch_size)
    return mask_batch(language, mask_key, sentences, targets, masking)


def mask_batch(
    language: Any, key: Array, sentences: Sentences, targets: str, masking: str = "one"
) -> MaskedBatch:
    """Mask one word of each sentence, uniform over its words, or (masking "share") `mask_share`.

    targets: "exact" gives the language's conditionals p(x_t | the words that are seen), "sampled"
    the masked word itself, one-hot. Both have the same expected gradient; the first has no label
    noise.
    """
    tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
    hidden = mask_id(language.num_words)
    if masking == "one":
        inputs_BxT, positions_BxM = mask_one(key, tokens_BxT, lengths_B, hidden)
        chosen_BxM = jnp.ones_like(positions_BxM, dtype=bool)
    else:
        inputs_BxT, positions_BxM, chosen_BxM = mask_share(key, tokens_BxT, lengths_B, hidden)
    if targets == "exact":
        masked_BxT = None if masking == "one" else inputs_BxT == hidden
        targets_BxMxV = jnp.exp(
            _conditionals_at(language, tokens_BxT, lengths_B, positions_BxM, masked_BxT)
        )
    else:
        words_BxM = jnp.take_along_axis(tokens_BxT, positions_BxM, axis=1)
        targets_BxMxV = jax.nn.one_hot(words_BxM, language.num_words)
    weights_BxM = chosen_BxM.astype(targets_BxMxV.dtype)
    return MaskedBatch(inputs_BxT, lengths_B, positions_BxM, targets_BxMxV, weights_BxM)


def questions(
    language: Any, key: Array, sentences: Sentences, masking: str, num_positions: int = 0
) -> Questions:
    """Every word in turn as the only one masked, or (masking "share") four draws of `mask_share`.

    With num_positions as many words of each sentence, drawn with replacement, stand for all. The
    weights of a sentence sum to 1 with one mask; else every hidden word counts 1.
    """
    if masking == "one":
        return _one_mask(language, key, sentences, num_positions)
    tokens_SxT, lengths_S = sentences.tokens_BxT, sentences.lengths_B
    hidden = mask_id(language.num_words)
    keys_R = jax.random.split(key, EVALUATED_MASKS)
    masked = [mask_share(k, tokens_SxT, lengths_S, hidden) for k in keys_R]
    inputs_SxRxT, positions_SxRxM, chosen_SxRxM = (
        jnp.stack(parts, axis=1) for parts in zip(*masked, strict=True)
    )
    log_probs = [
        _conditionals_at(language, tokens_SxT, lengths_S, positions, inputs == hidden)
        for inputs, positions, _ in masked
    ]
    log_probs_SxRxMxV = jnp.stack(log_probs, axis=1)
    return Questions(
        inputs_SxRxT=inputs_SxRxT,
        lengths_S=lengths_S,
        positions_SxRxM=positions_SxRxM,
        weights_SxRxM=chosen_SxRxM.astype(log_probs_SxRxMxV.dtype),
        words_SxRxM=jnp.take_along_axis(tokens_SxT[:, None], positions_SxRxM, axis=2),
        log_probs_SxRxMxV=log_probs_SxRxMxV,
    )


def _one_mask(language: Any, key: Array, sentences: Sentences, num_positions: int) -> Questions:
    """All T positions, those past the end of weight 0, or num_positions words of each sentence."""
    tokens_SxT, lengths_S = sentences.tokens_BxT, sentences.lengths_B
    S, T = tokens_SxT.shape
    inputs_SxRxT = mask_each(tokens_SxT, lengths_S, mask_id(language.num_words))
    if num_positions:
        shape, numbers_S = (S, num_positions), jnp.full_like(lengths_S, num_positions)
        positions_SxR = jax.random.randint(key, shape, 0, lengths_S[:, None], jnp.int32)
        inputs_SxRxT = jnp.take_along_axis(inputs_SxRxT, positions_SxR[..., None], axis=1)
        log_probs_SxRxV = _conditionals_at(language, tokens_SxT, lengths_S, positions_SxR, None)
    else:
        numbers_S = lengths_S
        positions_SxR = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (S, T))
        log_probs_SxRxV = language.conditional_log_probs(tokens_SxT, lengths_S)
    dtype = log_probs_SxRxV.dtype
    counted_SxR = (positions_SxR < lengths_S[:, None]).astype(dtype)
    return Questions(
        inputs_SxRxT=inputs_SxRxT,
        lengths_S=lengths_S,
        positions_SxRxM=positions_SxR[..., None],
        weights_SxRxM=(counted_SxR / numbers_S[:, None].astype(dtype))[..., None],
        words_SxRxM=jnp.take_along_axis(tokens_SxT, positions_SxR, axis=1)[..., None],
        log_probs_SxRxMxV=log_probs_SxRxV[:, :, None],
    )


def _conditionals_at(
    language: Any,
    tokens_BxT: Array,
    lengths_B: Array,
    positions_BxM: Array,
    masked_BxT: Array | None,
) -> Array:
    """log p at some positions, BxMxV nats; by the language's shorter way where it has one."""
    if masked_BxT is None and hasattr(language, "conditional_at"):
        return language.conditional_at(tokens_BxT, lengths_B, positions_BxM)
    log_probs_BxTxV = language.conditional_log_probs(tokens_BxT, lengths_B, masked_BxT)
    return jnp.take_along_axis(log_probs_BxTxV, positions_BxM[..., None], axis=1)
