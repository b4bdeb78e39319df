"""Randomness of the trace estimators: probes, labels, and running many of either.

Everything derives from an explicit key, folded with the indices of microbatch, draw or example.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Over
from jaxflat.flatness.products import LogProbsFn, PyTree, wide_log_probs
from jaxflat.flatness.terms import TraceTerms

SampleFn = Callable[[jax.Array], PyTree]  # index of the draw -> its terms, summed over predictions


def rademacher_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Independent random signs in the shapes and dtypes of the tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    probes = [
        jax.random.rademacher(keys[i], leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, probes)


def normal_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Independent standard normal numbers in the shapes and dtypes of the tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    normals = [jax.random.normal(keys[i], x.shape, x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, normals)


def draw_labels(key: jax.Array, log_probs: jax.Array, first_example: jax.Array) -> jax.Array:
    """Labels Bx... from log-probabilities Bx...xV, keyed by each example's global index."""
    examples_B = first_example + jnp.arange(log_probs.shape[0])
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(examples_B)
    return jax.vmap(jax.random.categorical)(keys_B, log_probs)


def score_sampler(
    log_probs_fn: LogProbsFn, params: PyTree, index: jax.Array, batch: PyTree
) -> tuple[Callable[[jax.Array], PyTree], jax.Array]:
    """`key -> g` of the index-th microbatch, and its weight; one backward pass a draw.

    g = sum_i sqrt(w_i) grad log p(y_i) with labels y_i ~ p_i that the model draws. Scores are
    independent with mean zero, so E[g g'] = sum_i w_i F_i. Labels depend on the key and the
    example's global index only, not on microbatches or devices.
    """
    log_probs, pullback, weights = jax.vjp(
        lambda p: wide_log_probs(log_probs_fn, p, batch), params, has_aux=True
    )
    batch_size, vocabulary = log_probs.shape[0], log_probs.shape[-1]
    scales = jnp.sqrt(weights.astype(log_probs.dtype))[..., None]

    def score(key: jax.Array) -> PyTree:
        labels = draw_labels(key, log_probs, index * batch_size)
        one_hot = jax.nn.one_hot(labels, vocabulary, dtype=log_probs.dtype)
        (gradient,) = pullback(scales * one_hot)
        return gradient

    return score, weights.sum()


def collect_terms(
    sampler: Callable[[jax.Array, PyTree], tuple[SampleFn, jax.Array]],
    batches: PyTree,
    num_draws: int,
    draws_per_pass: int,
    over: Over,
) -> TraceTerms:
    """Samples from `num_draws` draws in each of the M microbatches.

    `sampler(index, batch) -> (sample_fn, weight)` prepares what a microbatch's draws share.
    """
    num_microbatches = jax.tree.leaves(batches)[0].shape[0]
    if over not in ("probes", "probes+sentences"):
        raise ValueError(f"over must be 'probes' or 'probes+sentences', not {over!r}")
    if over == "probes+sentences" and num_microbatches < 2:
        raise ValueError("over='probes+sentences' needs at least 2 microbatches; or over='probes'")

    def microbatch(index_and_batch: tuple[jax.Array, PyTree]) -> tuple[PyTree, jax.Array]:
        sample_fn, weight = sampler(*index_and_batch)
        # A batch of one is slower than none.
        batch_size = draws_per_pass if draws_per_pass > 1 else None
        return jax.lax.map(sample_fn, jnp.arange(num_draws), batch_size=batch_size), weight

    terms_MxK, weights_M = jax.lax.map(microbatch, (jnp.arange(num_microbatches), batches))
    if over == "probes+sentences":
        return TraceTerms(jax.tree.map(lambda x: x.mean(axis=1), terms_MxK), weights_M, over)
    terms_K = jax.tree.map(lambda x: x.sum(axis=0), terms_MxK)
    return TraceTerms(terms_K, jnp.full(num_draws, weights_M.sum()), over)


def draw_probe(
    key: jax.Array, over: Over, microbatch: jax.Array, draw: jax.Array, params: PyTree
) -> PyTree:
    """The draw's random signs: shared by all microbatches if the data are fixed, else fresh."""
    return rademacher_like(_draw_key(key, over, microbatch, draw), params)


def draw_normal(
    key: jax.Array, over: Over, microbatch: jax.Array, draw: jax.Array, params: PyTree
) -> PyTree:
    """The draw's standard normal numbers, shared as those of `draw_probe` are."""
    return normal_like(_draw_key(key, over, microbatch, draw), params)


def _draw_key(key: jax.Array, over: Over, microbatch: jax.Array, draw: jax.Array) -> jax.Array:
    if over == "probes+sentences":
        key = jax.random.fold_in(key, microbatch)
    return jax.random.fold_in(key, draw)
