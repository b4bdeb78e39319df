"""Five small problems for the calibration of error bars; one of them has a low rank.

Parameters are float32, as in a run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Over
from jaxflat.languages.prefixes import is_prefix
from jaxflat.languages.sentences import is_word, mask_id
from jaxflat.models.causal import BLOCKS, make_sentence_model
from jaxflat.models.transformer import Transformer

PyTree = Any
POOL, FIXED = 32, 4  # microbatches to draw from with replacement; fixed microbatches
HEAD_SIZE = 4  # of the language models


@dataclass(frozen=True, eq=False)
class CalibrationProblem:
    """Log-probabilities at `params` over a pool of microbatches, and the block of each leaf."""

    name: str
    log_probs_fn: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]]
    params: PyTree
    pool: PyTree
    block_of: Callable[[str], str]

    def loss_fn(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        """Return the cross-entropy to the targets, summed over predictions, and their number."""
        log_probs, weights = self.log_probs_fn(params, batch)
        losses = -jnp.sum(batch["targets"] * log_probs, axis=-1)
        return jnp.sum(weights * losses), weights.sum()

    def excess_loss_fn(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        """Return KL(targets || model) in nats, summed over predictions, and their number."""
        log_probs, weights = self.log_probs_fn(params, batch)
        rises = jnp.log(batch["targets"]) - log_probs
        excesses = jnp.sum(batch["targets"] * rises, axis=-1)
        return jnp.sum(weights * excesses), weights.sum()

    def batches(self, over: Over) -> PyTree:
        """Return the fixed microbatches, or the pool from which seeds draw.

        For an error over sentences alone, each microbatch of the pool is one sentence.
        """
        if over == "probes":
            return jax.tree.map(lambda x: x[:FIXED], self.pool)
        if over == "sentences":
            return jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), self.pool)
        return self.pool


def make_problems() -> list[CalibrationProblem]:
    """Return the problems of every measure, the one of low rank last."""
    return [lookup_tables(), transformer(), logistic_regression()]


def make_causal_problems() -> list[CalibrationProblem]:
    """Return a causal language model of each block."""
    return [causal_model(block) for block in BLOCKS]


def lookup_tables(num_words: int = 12, size: int = 16) -> CalibrationProblem:
    """Make a model of two tables: logits are tanh(row of word before) + tanh(row of word after)."""
    keys = jax.random.split(jax.random.key(1), 6)
    shape, table = (POOL, size), (num_words, num_words)
    params = {
        "before": jax.random.normal(keys[0], table),
        "after": jax.random.normal(keys[1], table),
    }
    pool = {
        "before": jax.random.randint(keys[2], shape, 0, num_words),
        "after": jax.random.randint(keys[3], shape, 0, num_words),
        "weights": jax.random.bernoulli(keys[4], 0.8, shape).astype(jnp.float32),
    }

    def log_probs_fn(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        before, after = (jnp.tanh(params[side])[batch[side]] for side in ("before", "after"))
        return jax.nn.log_softmax(before + after), batch["weights"]

    pool["targets"] = _near_targets(log_probs_fn, params, pool, keys[5])
    return CalibrationProblem("lookup_tables", log_probs_fn, params, pool, lambda path: path)


def transformer(num_words: int = 16, length: int = 6, size: int = 4) -> CalibrationProblem:
    """Make a masked language model of 1,232 parameters, on ragged sentences with two masked words.

    In about half of the sentences only the first masked word counts.
    """
    model = Transformer(
        num_words=num_words,
        max_length=length,
        width=8,
        num_layers=1,
        num_heads=8 // HEAD_SIZE,
        tied_decoder=False,
    )
    keys = jax.random.split(jax.random.key(2), 6)
    shape = (POOL, size)
    lengths, words = _ragged_sentences(keys[0], keys[1], (*shape, length), num_words)
    first = jax.random.randint(keys[2], shape, 0, lengths - 1)
    positions = jnp.stack([first, first + 1], axis=-1)
    masked = (jnp.arange(length)[None, None, :, None] == positions[:, :, None, :]).any(-1)
    second = jax.random.bernoulli(keys[3], 0.5, shape).astype(jnp.float32)
    pool = {
        "tokens": jnp.where(masked, mask_id(num_words), words),
        "lengths": lengths,
        "positions": positions,
        "weights": jnp.stack([jnp.ones(shape), second], axis=-1),
    }

    params, log_probs_fn = _away_from_start(model, keys[4], pool)
    pool["targets"] = _near_targets(log_probs_fn, params, pool, keys[5])
    return CalibrationProblem("transformer", log_probs_fn, params, pool, _part)


def causal_model(
    block: str, num_words: int = 12, length: int = 6, size: int = 4
) -> CalibrationProblem:
    """Make a causal language model of either block, about as large, on ragged sentences.

    A sentence of n words has n + 1 predictions, or n if it is as long as possible. They share the
    words of their prefixes, and the targets of a sentence all err in the same direction. So the
    predictions of a sentence are not independent, and an error over predictions would be too small.
    """
    model = make_sentence_model(
        num_words,
        length,
        block=block,
        width=8,
        num_layers=1,
        head_size=HEAD_SIZE,
        tied_decoder=False,
    )
    keys = jax.random.split(jax.random.key(4), 4)
    lengths, words = _ragged_sentences(keys[0], keys[1], (POOL, size, length), num_words)
    predicted = jax.vmap(lambda n: is_prefix(n, length))(lengths)
    pool = {
        "tokens": words,
        "lengths": lengths,
        "positions": jnp.broadcast_to(jnp.arange(length)[None, None], words.shape),
        "weights": predicted.astype(jnp.float32),
    }
    params, log_probs_fn = _away_from_start(model, keys[2], pool)
    pool["targets"] = _near_targets(log_probs_fn, params, pool, keys[3], by_sentence=True)
    return CalibrationProblem(f"causal_{block}", log_probs_fn, params, pool, _part)


def _ragged_sentences(
    length_key: jax.Array, word_key: jax.Array, shape: tuple[int, ...], num_words: int
) -> tuple[jax.Array, jax.Array]:
    """Return lengths from 2 on, and words with padding behind them, of the shape (..., T)."""
    lengths = jax.random.randint(length_key, shape[:-1], 2, shape[-1] + 1)
    words = jax.random.randint(word_key, shape, 0, num_words)
    inside = jax.vmap(lambda n: is_word(n, shape[-1]))(lengths)
    return lengths, jnp.where(inside, words, num_words)


def _away_from_start(model: Any, key: jax.Array, pool: PyTree) -> tuple[Any, Callable]:
    """Return parameters of a language model, and its log_probs_fn.

    Embeddings are three times as large as at initialisation, as if they had grown in training. At
    initialisation a norm amplifies the few smallest of these: a handful of eigenvalues.
    """

    def inputs(batch: PyTree) -> tuple[jax.Array, ...]:
        return batch["tokens"], batch["lengths"], batch["positions"]

    def log_probs_fn(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, *inputs(batch))[0]
        return jax.nn.log_softmax(logits), batch["weights"]

    first_batch = jax.tree.map(lambda x: x[0], pool)
    params: Any = dict(model.init(key, *inputs(first_batch))["params"])
    params |= {name: 3 * x for name, x in params.items() if name.endswith("_embedding")}
    return params, log_probs_fn


def _part(path: str) -> str:
    """Return the part of a model: its embeddings, its only layer, or its decoder."""
    first = path.partition("/")[0]
    if first.endswith("_embedding"):
        return "embeddings"
    return "layer" if first in ("last", "stack") else "decoder"


def logistic_regression(num_features: int = 100, size: int = 16) -> CalibrationProblem:
    """Make features of standard deviations 1, 1/2, 1/3, ... along random axes: few dominate."""
    keys = jax.random.split(jax.random.key(3), 4)
    shape = (POOL, size)
    axes = jnp.linalg.qr(jax.random.normal(keys[0], (num_features, num_features)))[0]
    spread = jax.random.normal(keys[1], (*shape, num_features))
    pool = {
        "features": spread / jnp.arange(1.0, num_features + 1)[None, None] @ axes,
        "weights": jnp.ones(shape),
    }
    params = {"weights": jax.random.normal(keys[2], (num_features,))}

    def log_probs_fn(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        logits = batch["features"] @ params["weights"]
        return jax.nn.log_softmax(jnp.stack([logits, -logits], axis=-1)), batch["weights"]

    pool["targets"] = _near_targets(log_probs_fn, params, pool, keys[3])
    return CalibrationProblem("logistic_regression", log_probs_fn, params, pool, lambda path: path)


def _near_targets(
    log_probs_fn: Callable,
    params: PyTree,
    pool: PyTree,
    key: jax.Array,
    *,
    by_sentence: bool = False,
) -> Any:
    """Return the model's predictions with noise on the logits: the model is near its optimum.

    by_sentence: all predictions of a sentence have the same noise.
    """
    log_probs = jax.vmap(lambda batch: log_probs_fn(params, batch)[0])(pool)
    shape = log_probs.shape
    if by_sentence:
        shape = (*shape[:2], 1, shape[-1])
    return jax.nn.softmax(log_probs + 0.5 * jax.random.normal(key, shape))
