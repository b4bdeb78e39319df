"""Draw the random vectors (probes) and labels that the estimators use.

Every draw derives from an explicit key, folded with the index of a microbatch, draw or example.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxflat.flatness.estimate import Over
from jaxflat.flatness.inputs import LogProbsFn
from jaxflat.flatness.trees import PyTree


def rademacher_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Return independent random signs in the shapes and dtypes of the tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    probes = [
        jax.random.rademacher(keys[i], leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, probes)


def normal_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Return independent standard normal numbers in the shapes and dtypes of the tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    normals = [jax.random.normal(keys[i], x.shape, x.dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, normals)


def draw_probe(
    key: jax.Array, over: Over, microbatch: jax.Array, draw: jax.Array, params: PyTree
) -> PyTree:
    """Return a draw's random signs, shaped like params.

    With over="probes+sentences" each microbatch has its own; otherwise all share them.
    """
    return rademacher_like(_draw_key(key, over, microbatch, draw), params)


def draw_normal(
    key: jax.Array, over: Over, microbatch: jax.Array, draw: jax.Array, params: PyTree
) -> PyTree:
    """Return a draw's standard normal numbers, shared between microbatches as in `draw_probe`."""
    return normal_like(_draw_key(key, over, microbatch, draw), params)


def _draw_key(key: jax.Array, over: Over, microbatch: jax.Array, draw: jax.Array) -> jax.Array:
    if over == "probes+sentences":
        key = jax.random.fold_in(key, microbatch)
    return jax.random.fold_in(key, draw)


def draw_labels(key: jax.Array, log_probs: jax.Array, first_example: jax.Array) -> jax.Array:
    """Return labels Bx... from log-probabilities Bx...xV, keyed by each example's global index."""
    return jax.vmap(jax.random.categorical)(_example_keys(key, log_probs, first_example), log_probs)


def score_sampler(
    log_probs_fn: LogProbsFn, params: PyTree, index: jax.Array, batch: PyTree
) -> tuple[Callable[[jax.Array], PyTree], jax.Array]:
    """Return `key -> g` of the index-th microbatch, one backward pass, and its weight.

    g = sum_i sqrt(w_i) grad log p(y_i), with labels y_i ~ p_i that the model draws. The terms are
    independent with mean zero, so E[g g'] = sum_i w_i F_i. Labels depend only on the key and the
    example's global index, not on microbatches or devices.
    """

    def one_hot_labels(key: jax.Array, log_probs: jax.Array, first: jax.Array) -> jax.Array:
        labels = draw_labels(key, log_probs, first)
        return jax.nn.one_hot(labels, log_probs.shape[-1], dtype=log_probs.dtype)

    return _sampler(one_hot_labels, log_probs_fn, params, index, batch)


def signed_score_sampler(
    log_probs_fn: LogProbsFn, params: PyTree, index: jax.Array, batch: PyTree
) -> tuple[Callable[[jax.Array], PyTree], jax.Array]:
    """Return `key -> g` of the index-th microbatch, one backward pass, and its weight.

    g = sum_i sqrt(w_i) sum_v s_iv sqrt(p_i(v)) grad log p_i(v) with random signs s_iv. As for drawn
    labels, E[g g'] = sum_i w_i F_i. But every word counts in every draw, so none of the gradients
    of rare words is missed. Signs depend only on the key and the example's global index.
    """

    def signed_roots(key: jax.Array, log_probs: jax.Array, first: jax.Array) -> jax.Array:
        draw = partial(jax.random.rademacher, shape=log_probs.shape[1:], dtype=log_probs.dtype)
        return jnp.exp(log_probs / 2) * jax.vmap(draw)(_example_keys(key, log_probs, first))

    return _sampler(signed_roots, log_probs_fn, params, index, batch)


def _example_keys(key: jax.Array, log_probs: jax.Array, first_example: jax.Array) -> jax.Array:
    """Return keys_B, one for the global index of each example."""
    examples_B = first_example + jnp.arange(log_probs.shape[0])
    return jax.vmap(partial(jax.random.fold_in, key))(examples_B)


def _sampler(
    draw: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    log_probs_fn: LogProbsFn,
    params: PyTree,
    index: jax.Array,
    batch: PyTree,
) -> tuple[Callable[[jax.Array], PyTree], jax.Array]:
    """Return `key -> g` for g = sum_i sqrt(w_i) sum_v c_iv grad log p_i(v), and the weight.

    draw(key, log_probs, first example) returns c, in the shape of log_probs.
    """
    log_probs, pullback, weights = jax.vjp(lambda p: log_probs_fn(p, batch), params, has_aux=True)
    scales = jnp.sqrt(weights.astype(log_probs.dtype))[..., None]

    def score(key: jax.Array) -> PyTree:
        (gradient,) = pullback(scales * draw(key, log_probs, index * log_probs.shape[0]))
        return gradient

    return score, weights.sum()
