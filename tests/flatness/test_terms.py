"""Traces of a real model, whole and by block, against its dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import softmax_table
import tiny_masked_lm as lm
from scipy import stats

from jaxflat.flatness import (
    TraceTerms,
    fisher_trace_terms,
    gauss_newton_trace,
    hessian_trace_samples,
    hessian_trace_terms,
    sample_until,
)
from jaxflat.flatness.terms import path_name

KEY = jax.random.key(4)


def layer_of(path):
    """The layers of the stack apart, everything else by its top-level name."""
    names = path.split("/")
    return f"layer_{names[-1]}" if names[0] == "stack" else names[0]


def hessian_and_fisher_terms(params, batches):
    args, how = (params, batches, KEY), {"over": "probes", "stacked": lm.is_stacked}
    hessian = hessian_trace_terms(lm.loss_fn, *args, num_probes=256, **how)
    return hessian, fisher_trace_terms(lm.log_probs_fn, *args, num_samples=256, **how)


@pytest.fixture(scope="module")
def problem():
    params, batches = lm.make_params(), lm.make_batches(3, 4)
    dense = lm.dense_hessian(params, batches), lm.dense_gauss_newton(params, batches)
    return params, batches, dense, hessian_and_fisher_terms(params, batches)


@pytest.fixture(params=["hessian", "fisher"])
def terms_and_diagonal(request, problem):
    params, _, dense, terms = problem
    which = ["hessian", "fisher"].index(request.param)
    return terms[which], lm.diagonal_like(params, dense[which])


def assert_within(estimate, truth, num_sems=3):
    assert abs(estimate.mean - truth) < num_sems * estimate.sem


def test_the_traces_agree_at_saturation_and_only_there(problem):
    params, batches, (hessian, gauss_newton), terms = problem

    def traces(batches, hessian_and_fisher):
        args = lm.log_probs_fn, params, batches, KEY
        found = gauss_newton_trace(*args, num_probes=256, over="probes")
        return [*(terms.total() for terms in hessian_and_fisher), found]

    optimal = lm.saturated(params, batches)
    np.testing.assert_allclose(lm.dense_hessian(params, optimal), gauss_newton, atol=1e-10)
    for estimate in traces(optimal, hessian_and_fisher_terms(params, optimal)):
        assert_within(estimate, jnp.trace(gauss_newton))

    of_hessian, *of_others = traces(batches, terms)
    assert_within(of_hessian, jnp.trace(hessian))
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


@pytest.mark.parametrize("problem", [softmax_table, pytest.param(lm, marks=pytest.mark.slow)])
@pytest.mark.parametrize("over", ["probes", "probes+sentences"])
def test_terms_add_up_to_the_forward_only_samples(problem, over):
    """Sample by sample, with terms that know of no stacking."""
    args = problem.loss_fn, problem.make_params(), problem.make_batches(3, 4), KEY
    terms, samples = (
        trace(*args, num_probes=5, over=over, probes_per_pass=5)
        for trace in (hessian_trace_terms, hessian_trace_samples)
    )
    assert {leaf.shape for leaf in jax.tree.leaves(terms.terms)} == {samples.terms.shape}
    added_n = sum(jax.tree.leaves(terms.terms))
    np.testing.assert_allclose(samples.terms, added_n, rtol=1e-10)
    np.testing.assert_array_equal(samples.weights_n, terms.weights_n)
    found, expected = samples.total(), terms.total()
    np.testing.assert_allclose([found.mean, found.sem], [expected.mean, expected.sem], rtol=1e-10)
    assert (found.num_samples, found.over) == (expected.num_samples, expected.over)
    assert (found.num_samples, found.over) == (5 if over == "probes" else 3, over)


def test_terms_concatenated_are_those_of_one_collection():
    """Cut anywhere, by leaf and with the weights."""
    rng = np.random.default_rng(0)
    leaves = {
        "plain": jnp.asarray(rng.normal(size=9)),
        "stack": jnp.asarray(rng.normal(size=(9, 2))),
    }
    whole = TraceTerms(leaves, jnp.asarray(rng.integers(1, 9, size=9)), "probes+sentences")
    parts = [jax.tree.map(lambda x, s=s: x[s], whole) for s in np.split(np.arange(9), [2, 3])]
    again = TraceTerms.concatenate(parts)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert (again.total().num_samples, again.over) == (9, "probes+sentences")


def test_sampling_stops_at_the_first_look_that_is_precise():
    samples_RxN = 3 + np.random.default_rng(1).normal(size=(11, 4))
    looks = set()
    for relative_error in (0.5, 0.2, 0.14, 0.0):
        drawn = []

        def draw_round(i, drawn=drawn):
            drawn.append(i)
            return TraceTerms(jnp.asarray(samples_RxN[i]), jnp.ones(4), "probes")

        found = sample_until(draw_round, relative_error, max_rounds=11)
        for look in (1, 2, 4, 8, 11):
            seen_N = samples_RxN[:look].ravel()
            low, high = stats.t.interval(0.95, len(seen_N) - 1, seen_N.mean(), stats.sem(seen_N))
            if (high - low) / 2 <= relative_error * seen_N.mean():
                break
        looks.add(look)
        assert drawn == list(range(look))
        np.testing.assert_array_equal(found.terms, seen_N)
    assert looks == {1, 2, 4, 11}
