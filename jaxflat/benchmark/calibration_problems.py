"""Three small problems for the calibration of error bars: two of high rank, one of low rank.

Parameters are float32, as in a run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Over
from jaxflat.languages.sentences import is_word, mask_id
from jaxflat.models.transformer import Transformer

PyTree = Any
POOL, FIXED = 32, 4  # microbatches to draw from with replacement; fixed microbatches


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

    def batches(self, over: Over) -> PyTree:
        """Return the fixed microbatches, or the pool from which seeds draw."""
        return self.pool if over != "probes" else jax.tree.map(lambda x: x[:FIXED], self.pool)


def make_problems() -> list[CalibrationProblem]:
    """Return the problems, the one of low rank last."""
    return [lookup_tables(), transformer(), logistic_regression()]


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

    In about half of the sentences only the first masked word counts. Embeddings are three times as
    large as at initialisation, as if they had grown in training.
    """
    model = Transformer(
        num_words=num_words,
        max_length=length,
        width=8,
        num_layers=1,
        num_heads=2,
        tied_decoder=False,
    )
    keys = jax.random.split(jax.random.key(2), 6)
    shape = (POOL, size)
    lengths = jax.random.randint(keys[0], shape, 2, length + 1)
    words = jax.random.randint(keys[1], (*shape, length), 0, num_words)
    words = jnp.where(jax.vmap(lambda n: is_word(n, length))(lengths), words, num_words)
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

    def inputs(batch: PyTree) -> tuple[jax.Array, ...]:
        return batch["tokens"], batch["lengths"], batch["positions"]

    def log_probs_fn(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, *inputs(batch))[0]
        return jax.nn.log_softmax(logits), batch["weights"]

    first_batch = jax.tree.map(lambda x: x[0], pool)
    params: Any = dict(model.init(keys[4], *inputs(first_batch))["params"])
    # At initialisation a layer norm amplifies the few smallest of these: a handful of eigenvalues.
    params |= {name: 3 * x for name, x in params.items() if name.endswith("_embedding")}
    pool["targets"] = _near_targets(log_probs_fn, params, pool, keys[5])
    return CalibrationProblem("transformer", log_probs_fn, params, pool, _part)


def _part(path: str) -> str:
    """Return the part of the transformer: its embeddings, its only layer, or its decoder."""
    first = path.partition("/")[0]
    if first.endswith("_embedding"):
        return "embeddings"
    return "layer" if first == "last" else "decoder"


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


def _near_targets(log_probs_fn: Callable, params: PyTree, pool: PyTree, key: jax.Array) -> Any:
    """Return the model's predictions with noise on the logits: the model is near its optimum."""
    log_probs = jax.vmap(lambda batch: log_probs_fn(params, batch)[0])(pool)
    return jax.nn.softmax(log_probs + 0.5 * jax.random.normal(key, log_probs.shape))
