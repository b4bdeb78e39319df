"""Products, quadratic forms and traces of a real model against its dense matrices, in float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxflat.flatness import (
    fisher_trace_terms,
    fisher_vector_product,
    gauss_newton_quadratic_form,
    gauss_newton_trace,
    gauss_newton_vector_product,
    hessian_quadratic_form,
    hessian_trace_terms,
    hessian_vector_product,
)
from jaxflat.flatness.trees import path_name
from tests.support import tiny_masked_lm as lm

KEY = jax.random.key(4)


def layer_of(path):
    """One block for each layer of the stack; the top-level name for all other leaves."""
    names = path.split("/")
    return f"layer_{names[-1]}" if names[0] == "stack" else names[0]


def hessian_and_fisher_terms(params, batches):
    args, how = (params, batches, KEY), {"over": "probes", "stacked": lm.is_stacked}
    hessian = hessian_trace_terms(lm.loss_fn, *args, num_probes=256, **how)
    return hessian, fisher_trace_terms(lm.log_probs_fn, *args, num_samples=256, **how)


@pytest.fixture(scope="module")
def problem():
    """Ragged sentences, unequal microbatches, and a vector to multiply."""
    params, batches = lm.make_params(), lm.make_batches(3, 4)
    assert len(set(batches["weights"].sum((1, 2)).tolist())) > 1
    assert len(set(batches["lengths"].ravel().tolist())) > 2
    flat, unravel = ravel_pytree(params)
    flat_vector = jax.random.normal(jax.random.key(5), flat.shape, flat.dtype)
    return SimpleNamespace(
        params=params,
        batches=batches,
        args=(params, batches, unravel(flat_vector)),
        flat_vector=flat_vector,
        hessian=lm.dense_hessian(params, batches),
        gauss_newton=lm.dense_gauss_newton(params, batches),
    )


@pytest.fixture(scope="module")
def terms(problem):
    return hessian_and_fisher_terms(problem.params, problem.batches)


@pytest.fixture(params=["hessian", "fisher"])
def terms_and_diagonal(request, problem, terms):
    if request.param == "hessian":
        return terms[0], lm.diagonal_like(problem.params, problem.hessian)
    return terms[1], lm.diagonal_like(problem.params, problem.gauss_newton)


def assert_equal(product, expected):
    atol = 1e-8 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(ravel_pytree(product)[0], expected, rtol=0, atol=atol)


@pytest.mark.slow
def test_vector_products_equal_the_dense_ones(problem):
    product = hessian_vector_product(lm.loss_fn, *problem.args)
    assert_equal(product, problem.hessian @ problem.flat_vector)
    product = gauss_newton_vector_product(lm.log_probs_fn, *problem.args)
    assert_equal(product, problem.gauss_newton @ problem.flat_vector)


@pytest.mark.slow
def test_quadratic_forms_equal_the_dense_ones(problem):
    form = hessian_quadratic_form(lm.loss_fn, *problem.args)
    assert_equal(form, problem.flat_vector @ problem.hessian @ problem.flat_vector)
    form = gauss_newton_quadratic_form(lm.log_probs_fn, *problem.args)
    assert_equal(form, problem.flat_vector @ problem.gauss_newton @ problem.flat_vector)


@pytest.mark.slow
def test_fisher_vector_product_equals_the_dense_one(problem):
    """Sum over predictions of g g', g = J' (e_y - p), for given labels y."""
    params, batches, vector = problem.args
    labels = jax.random.randint(jax.random.key(6), batches["weights"].shape, 0, lm.V)
    batch, labels_BxM = lm.merge(batches), labels.reshape(-1, labels.shape[-1])
    probs = jnp.exp(jax.jit(lm.log_probs_fn)(params, batch)[0])
    errors = jax.nn.one_hot(labels_BxM, lm.V) - probs
    scores = jnp.einsum("bmv,bmvp->bmp", errors, lm.logits_jacobian(params, batch))
    weights = batch["weights"] / batch["weights"].sum()
    fisher = jnp.einsum("bm,bmi,bmj->ij", weights, scores, scores)
    product = fisher_vector_product(lm.log_probs_fn, params, batches, labels, vector)
    assert_equal(product, fisher @ problem.flat_vector)


def assert_within(estimate, truth, num_sems=3):
    assert abs(estimate.mean - truth) < num_sems * estimate.sem


@pytest.mark.slow
def test_the_traces_agree_at_saturation_and_only_there(problem, terms):
    params, batches, gauss_newton = problem.params, problem.batches, problem.gauss_newton

    def traces(batches, hessian_and_fisher):
        args = lm.log_probs_fn, params, batches, KEY
        found = gauss_newton_trace(*args, num_probes=256, over="probes")
        return [*(terms.total() for terms in hessian_and_fisher), found]

    optimal = lm.saturated(params, batches)
    np.testing.assert_allclose(lm.dense_hessian(params, optimal), gauss_newton, atol=1e-10)
    for estimate in traces(optimal, hessian_and_fisher_terms(params, optimal)):
        assert_within(estimate, jnp.trace(gauss_newton))

    of_hessian, *of_others = traces(batches, terms)
    assert_within(of_hessian, jnp.trace(problem.hessian))
    for estimate in of_others:
        assert_within(estimate, jnp.trace(gauss_newton))
    with pytest.raises(AssertionError):
        assert_within(of_hessian, jnp.trace(gauss_newton))


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


@pytest.mark.slow
def test_each_block_equals_the_dense_block(terms_and_diagonal):
    terms, diagonal = terms_and_diagonal
    blocks, expected = terms.by_block(layer_of), dense_blocks(diagonal)
    assert blocks.keys() == expected.keys() >= {"layer_0", "layer_1", "last", "decoder"}
    for name, estimate in blocks.items():
        assert abs(estimate.mean - expected[name]) < 4 * estimate.sem


@pytest.mark.slow
def test_blocks_sum_to_the_total(terms_and_diagonal):
    terms, _ = terms_and_diagonal
    blocks = terms.by_block(layer_of)
    np.testing.assert_allclose(
        sum(float(block.mean) for block in blocks.values()), terms.total().mean, rtol=1e-12
    )
    everything = terms.by_block(lambda path: "everything")["everything"]
    np.testing.assert_allclose(everything.sem, terms.total().sem, rtol=1e-12)


@pytest.mark.slow
def test_weighted_equals_the_dense_weighted_sum(terms_and_diagonal):
    """Plain leaves have scalar factors, stacked leaves one factor per layer."""
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
