"""Traces by block against the blocks of the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import softmax_table
import tiny_masked_lm as lm

from jaxflat.flatness import fisher_trace_terms, hessian_trace, hessian_trace_terms
from jaxflat.flatness.terms import path_name


def layer_of(path):
    """The layers of the stack apart, everything else by its top-level name."""
    names = path.split("/")
    return f"layer_{names[-1]}" if names[0] == "stack" else names[0]


@pytest.fixture(scope="module", params=["hessian", "fisher"])
def terms_and_diagonal(request):
    params, batches, key = lm.make_params(), lm.make_batches(3, 4), jax.random.key(4)
    if request.param == "hessian":
        terms = hessian_trace_terms(
            lm.loss_fn, params, batches, key, num_probes=256, over="probes", stacked=lm.is_stacked
        )
        return terms, lm.diagonal_like(params, lm.dense_hessian(params, batches))
    terms = fisher_trace_terms(
        lm.log_probs_fn, params, batches, key, num_samples=256, over="probes", stacked=lm.is_stacked
    )
    return terms, lm.diagonal_like(params, lm.dense_gauss_newton(params, batches))


def dense_blocks(diagonal):
    blocks = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(diagonal):
        name = path_name(path)
        layers = (
            {f"{name}/{i}": x for i, x in enumerate(leaf)} if lm.is_stacked(name) else {name: leaf}
        )
        for layer_name, layer in layers.items():
            blocks[layer_of(layer_name)] = blocks.get(layer_of(layer_name), 0.0) + layer.sum()
    return blocks


def test_each_block_equals_the_dense_block(terms_and_diagonal):
    terms, diagonal = terms_and_diagonal
    blocks, expected = terms.by_block(layer_of), dense_blocks(diagonal)
    assert blocks.keys() == expected.keys() >= {"layer_0", "layer_1", "last", "decoder"}
    for name, estimate in blocks.items():
        assert abs(estimate.mean - expected[name]) < 4 * estimate.sem


def test_blocks_sum_to_the_total(terms_and_diagonal):
    terms, _ = terms_and_diagonal
    blocks = terms.by_block(layer_of)
    np.testing.assert_allclose(
        sum(float(block.mean) for block in blocks.values()), terms.total().mean, rtol=1e-12
    )
    everything = terms.by_block(lambda path: "everything")["everything"]
    np.testing.assert_allclose(everything.sem, terms.total().sem, rtol=1e-12)


def test_weighted_equals_the_dense_weighted_sum(terms_and_diagonal):
    """Scalar factors for plain leaves, one a layer for stacked ones."""
    terms, diagonal = terms_and_diagonal
    paths, structure = jax.tree_util.tree_flatten_with_path(diagonal)
    means = {path: leaf.mean for path, leaf in terms.by_block(lambda path: path).items()}
    factors, dense, from_leaves = [], 0.0, 0.0
    for i, (path, leaf) in enumerate(paths):
        name, factor = path_name(path), 1.0 + i % 3
        if lm.is_stacked(name):
            factors.append(jnp.asarray([factor, -factor]))
            dense += factor * (leaf[0].sum() - leaf[1].sum())
            from_leaves += factor * (means[f"{name}/0"] - means[f"{name}/1"])
        else:
            factors.append(factor)
            dense += factor * leaf.sum()
            from_leaves += factor * means[name]
    estimate = terms.weighted(jax.tree.unflatten(structure, factors))
    assert abs(estimate.mean - dense) < 4 * estimate.sem
    np.testing.assert_allclose(estimate.mean, from_leaves, rtol=1e-10)


def test_terms_need_not_know_of_stacking():
    args = softmax_table.loss_fn, softmax_table.make_params(), softmax_table.make_batches(3, 4)
    terms = hessian_trace_terms(*args, jax.random.key(4), num_probes=2)
    assert {leaf.shape for leaf in jax.tree.leaves(terms.terms)} == {(3,)}
    total = hessian_trace(*args, jax.random.key(4), num_probes=2)
    np.testing.assert_allclose(terms.total().mean, total.mean, rtol=1e-12)
    assert total.num_samples == 3
    assert total.over == "probes+sentences"
