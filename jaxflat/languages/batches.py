"""Ask for predictions of sentences' words: batches for training, and questions for evaluation.

Masking "one" or "share" hides words within a sentence. With "causal" every prediction sees the
words before it, and the symbols are the V words and the stop, whose index is V.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxflat.languages.sentences import Sentences, is_word, mask_id

MASKED_SHARE, MOST_MASKED = 0.15, 5
EVALUATED_MASKS = 4  # draws of masks per evaluation sentence, with masking "share"


def mask_one(key: Array, tokens_BxT: Array, lengths_B: Array, hidden: int) -> tuple[Array, Array]:
    """Return (inputs_BxT, positions_Bx1): one masked word per sentence, uniform over its words."""
    positions_Bx1 = jax.random.randint(key, (len(tokens_BxT), 1), 0, lengths_B[:, None], jnp.int32)
    positions_T = jnp.arange(tokens_BxT.shape[1], dtype=positions_Bx1.dtype)
    masked_BxT = positions_T[None] == positions_Bx1
    return jnp.where(masked_BxT, hidden, tokens_BxT), positions_Bx1


def mask_share(
    key: Array, tokens_BxT: Array, lengths_B: Array, hidden: int
) -> tuple[Array, Array, Array]:
    """Mask 15% of each sentence's words, 1 to M = 5 of them, drawn uniformly.

    Returns (inputs_BxT, positions_BxM, chosen_BxM). Where chosen_BxM is False, the position repeats
    the first one. Every chosen word becomes the mask. None stays or becomes another word, because
    exact conditionals could not tell it from words that were not chosen.
    """
    T = tokens_BxT.shape[1]
    words_BxT = is_word(lengths_B, T)
    ranks_BxT = jnp.where(words_BxT, jax.random.uniform(key, tokens_BxT.shape), 2)
    order_BxM = jnp.argsort(ranks_BxT, axis=1)[:, :MOST_MASKED].astype(jnp.int32)
    share_B = jnp.round(MASKED_SHARE * lengths_B.astype(jnp.float32)).astype(jnp.int32)
    number_Bx1 = jnp.clip(share_B, 1, MOST_MASKED)[:, None]
    chosen_BxM = jnp.arange(order_BxM.shape[1], dtype=jnp.int32)[None] < number_Bx1
    positions_BxM = jnp.where(chosen_BxM, order_BxM, order_BxM[:, :1])
    masked_BxT = jnp.any(
        jnp.arange(T, dtype=jnp.int32)[None, None] == positions_BxM[..., None], axis=1
    )
    return jnp.where(masked_BxT, hidden, tokens_BxT), positions_BxM, chosen_BxM


def mask_each(tokens_BxT: Array, lengths_B: Array, hidden: int) -> Array:
    """Return inputs_BxTxT: row t masks word t, and rows past the end mask nothing."""
    T = tokens_BxT.shape[1]
    masked_BxTxT = jnp.eye(T, dtype=bool)[None] & is_word(lengths_B, T)[..., None]
    return jnp.where(masked_BxTxT, hidden, tokens_BxT[:, None])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OneHot:
    """Symbols in place of their one-hot distributions, which have num_symbols numbers each."""

    symbols_BxM: Array
    num_symbols: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Sentences, with words hidden if masking hides them, and the targets of predictions of words.

    targets_BxMxV is a distribution over words for each of the positions_BxM. weights_BxM is 1, or 0
    beyond a sentence's number of predictions.
    """

    inputs_BxT: Array
    lengths_B: Array
    positions_BxM: Array
    targets: Array | OneHot
    weights_BxM: Array

    @property
    def targets_BxMxV(self) -> Array:
        """The distributions. One-hot ones are made anew: ask for them within a microbatch."""
        if isinstance(self.targets, OneHot):
            return jax.nn.one_hot(self.targets.symbols_BxM, self.targets.num_symbols)
        return self.targets

    def cut(self, length: int) -> "Batch":
        """Return the same predictions, without the positions from `length` on."""
        return replace(self, inputs_BxT=self.inputs_BxT[:, :length])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalBatch(Batch):
    """Sentences, and the targets of the next symbol at each of the positions 0..M-1.

    Position s follows s words. Its weight is 1, or 0 beyond the sentence's stop symbol.
    """

    def cut(self, length: int) -> "CausalBatch":
        """Return the predictions that follow at most `length` words."""
        kept = slice(length + 1)
        return CausalBatch(
            inputs_BxT=self.inputs_BxT[:, :length],
            lengths_B=self.lengths_B,
            positions_BxM=self.positions_BxM[:, kept],
            targets=jax.tree.map(lambda x: x[:, kept], self.targets),
            weights_BxM=self.weights_BxM[:, kept],
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Questions:
    """R masked copies of each of S sentences, with the hidden words and their exact conditionals.

    log_probs_SxRxMxV are in nats, None if the language does not know them. weights_SxRxM weight the
    predictions.
    """

    inputs_SxRxT: Array
    lengths_S: Array
    positions_SxRxM: Array
    weights_SxRxM: Array
    words_SxRxM: Array
    log_probs_SxRxMxV: Array | None


class Source(NamedTuple):
    """Where training sentences come from: the language, or stored ones (SxBxT) of S steps."""

    language: Any
    stored: Sentences | None = None


def source_batch(
    source: Source, key: Array, step: Array, batch_size: int, targets: str, masking: str
) -> Batch:
    """Return the batch of new sentences, or of the stored ones of a step (from 0)."""
    if source.stored is None:
        return sampled_batch(source.language, key, batch_size, targets, masking)
    sentences = jax.tree.map(lambda x: x[step], source.stored)
    return make_batch(source.language, jax.random.split(key)[1], sentences, targets, masking)


def sampled_batch(
    language: Any, key: Array, batch_size: int, targets: str, masking: str = "one"
) -> Batch:
    """Sample sentences and return their batch; see `make_batch`."""
    sentence_key, mask_key = jax.random.split(key)
    sentences = language.sample(sentence_key, batch_size)
    return make_batch(language, mask_key, sentences, targets, masking)


def make_batch(
    language: Any, key: Array, sentences: Sentences, targets: str, masking: str = "one"
) -> Batch:
    """Return the batch of sentences, masked by `mask_one` ("one") or `mask_share` ("share").

    With masking "causal" nothing is drawn or masked, and the result is a CausalBatch.

    targets: "exact" gives the language's conditionals p(x_t | the unmasked words), "sampled" the
    masked word itself, one-hot. Both have the same expected gradient; "exact" has no label noise.
    """
    if masking == "causal":
        return _causal_batch(language, sentences, targets)
    tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
    hidden = mask_id(language.num_words)
    if masking == "one":
        inputs_BxT, positions_BxM = mask_one(key, tokens_BxT, lengths_B, hidden)
        chosen_BxM = jnp.ones_like(positions_BxM, dtype=bool)
    else:
        inputs_BxT, positions_BxM, chosen_BxM = mask_share(key, tokens_BxT, lengths_B, hidden)
    if targets == "exact":
        masked_BxT = None if masking == "one" else inputs_BxT == hidden
        log_probs_BxMxV = _conditionals_at(
            language, tokens_BxT, lengths_B, positions_BxM, masked_BxT
        )
        assert log_probs_BxMxV is not None  # `check_uses` refuses exact targets otherwise
        answers = jnp.exp(log_probs_BxMxV)
    else:
        words_BxM = jnp.take_along_axis(tokens_BxT, positions_BxM, axis=1)
        answers = OneHot(words_BxM, language.num_words)
    return Batch(inputs_BxT, lengths_B, positions_BxM, answers, chosen_BxM.astype(float))


def _causal_batch(language: Any, sentences: Sentences, targets: str) -> CausalBatch:
    positions_BxS, symbols_BxS, counted_BxS = _next_symbols(sentences)
    if targets == "exact":
        log_probs_BxSxU = _next_log_probs(language, sentences)
        assert log_probs_BxSxU is not None  # `check_uses` refuses exact targets otherwise
        answers = jnp.exp(log_probs_BxSxU)
    else:
        answers = OneHot(symbols_BxS, language.num_words + 1)
    tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
    return CausalBatch(tokens_BxT, lengths_B, positions_BxS, answers, counted_BxS.astype(float))


def _next_symbols(sentences: Sentences) -> tuple[Array, Array, Array]:
    """Return (positions_BxS, symbols_BxS, counted_BxS) of the S = T predictions of next symbols.

    Position s follows s words. Past the sentence's stop, symbols do not count. The stop after
    max_length words is certain, so it is no prediction.
    """
    tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
    positions_S = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)
    positions_BxS = jnp.broadcast_to(positions_S[None], tokens_BxT.shape)
    return positions_BxS, tokens_BxT, positions_BxS <= lengths_B[:, None]


def _next_log_probs(language: Any, sentences: Sentences) -> Array | None:
    """Return the exact log p of the next symbol at these S positions, BxSxU nats, if known."""
    if not hasattr(language, "next_log_probs"):
        return None
    tokens_BxT, lengths_B = sentences.tokens_BxT, sentences.lengths_B
    return language.next_log_probs(tokens_BxT, lengths_B)[:, : tokens_BxT.shape[1]]


def interleave_by_length(batch: Batch, num_groups: int) -> Batch:
    """Reorder a batch: of n = num_groups, examples k, k + n, k + 2n, ... have similar lengths."""
    order_B = jnp.argsort(batch.lengths_B).reshape(num_groups, -1).T.reshape(-1)
    return jax.tree.map(lambda x: x[order_B], batch)


def make_questions(
    language: Any, key: Array, sentences: Sentences, masking: str, num_positions: int = 0
) -> Questions:
    """Mask every word in turn (masking "one"), or draw `mask_share` four times (masking "share").

    If num_positions is not 0, masking "one" masks that many words of each sentence in turn, drawn
    with replacement. Its weights sum to 1 per sentence. With "share" each hidden word has 1.
    Masking "causal" asks for the next symbol at each position of one copy (R = 1), of weight 1.
    """
    if masking == "causal":
        return _next_questions(language, sentences)
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
    log_probs_SxRxMxV = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *log_probs)  # None: None
    return Questions(
        inputs_SxRxT=inputs_SxRxT,
        lengths_S=lengths_S,
        positions_SxRxM=positions_SxRxM,
        weights_SxRxM=chosen_SxRxM.astype(_dtype(log_probs_SxRxMxV)),
        words_SxRxM=jnp.take_along_axis(tokens_SxT[:, None], positions_SxRxM, axis=2),
        log_probs_SxRxMxV=log_probs_SxRxMxV,
    )


def _next_questions(language: Any, sentences: Sentences) -> Questions:
    positions_SxM, symbols_SxM, counted_SxM = _next_symbols(sentences)
    log_probs_SxMxU = _next_log_probs(language, sentences)
    return Questions(
        inputs_SxRxT=sentences.tokens_BxT[:, None],
        lengths_S=sentences.lengths_B,
        positions_SxRxM=positions_SxM[:, None],
        weights_SxRxM=counted_SxM.astype(_dtype(log_probs_SxMxU))[:, None],
        words_SxRxM=symbols_SxM[:, None],
        log_probs_SxRxMxV=None if log_probs_SxMxU is None else log_probs_SxMxU[:, None],
    )


def _one_mask(language: Any, key: Array, sentences: Sentences, num_positions: int) -> Questions:
    """Ask all T positions, with weight 0 past the end, or num_positions words of each sentence."""
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
        log_probs_SxRxV = None
        if hasattr(language, "conditional_log_probs"):
            log_probs_SxRxV = language.conditional_log_probs(tokens_SxT, lengths_S)
    dtype = _dtype(log_probs_SxRxV)
    counted_SxR = (positions_SxR < lengths_S[:, None]).astype(dtype)
    return Questions(
        inputs_SxRxT=inputs_SxRxT,
        lengths_S=lengths_S,
        positions_SxRxM=positions_SxR[..., None],
        weights_SxRxM=(counted_SxR / numbers_S[:, None].astype(dtype))[..., None],
        words_SxRxM=jnp.take_along_axis(tokens_SxT, positions_SxR, axis=1)[..., None],
        log_probs_SxRxMxV=None if log_probs_SxRxV is None else log_probs_SxRxV[:, :, None],
    )


def log_probs_by_word(language: Any, tokens_BxT: Array, lengths_B: Array, masking: str) -> Array:
    """Return what a perfect model predicts at each word, in nats.

    The word given all others, BxTxV. With masking "causal" the next symbol given the words so far,
    BxTxU.
    """
    if masking == "causal":
        return language.next_log_probs(tokens_BxT, lengths_B)[:, 1:]
    return language.conditional_log_probs(tokens_BxT, lengths_B)


def _dtype(log_probs: Array | None) -> Any:
    return jnp.float32 if log_probs is None else log_probs.dtype


def _conditionals_at(
    language: Any,
    tokens_BxT: Array,
    lengths_B: Array,
    positions_BxM: Array,
    masked_BxT: Array | None,
) -> Array | None:
    """Return log p at positions_BxM, BxMxV nats, by `conditional_at` if the language has it.

    None if the language does not know its conditionals.
    """
    if not hasattr(language, "conditional_log_probs"):
        return None
    if masked_BxT is None and hasattr(language, "conditional_at"):
        return language.conditional_at(tokens_BxT, lengths_B, positions_BxM)
    log_probs_BxTxV = language.conditional_log_probs(tokens_BxT, lengths_B, masked_BxT)
    return jnp.take_along_axis(log_probs_BxTxV, positions_BxM[..., None], axis=1)
