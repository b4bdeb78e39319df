"""Samples of traces: sums, concatenation, and sampling until precise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxflat.flatness import TraceTerms, hessian_trace_samples, hessian_trace_terms, sample_until
from tests.support import softmax_table
from tests.support import tiny_masked_lm as lm

KEY = jax.random.key(4)


@pytest.mark.parametrize("problem", [softmax_table, pytest.param(lm, marks=pytest.mark.slow)])
@pytest.mark.parametrize("over", ["probes", "probes+sentences"])
@pytest.mark.slow
def test_terms_add_up_to_the_forward_only_samples(problem, over):
    """Sample by sample, without stacked leaves."""
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
    """Parts cut at any place have the same leaves and weights."""
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


@pytest.mark.parametrize(("min_samples", "expected"), [(0, {1, 2, 4, 11}), (9, {4, 11})])
def test_sampling_stops_at_the_first_look_that_is_precise(min_samples, expected):
    samples_RxN = 3 + np.random.default_rng(1).normal(size=(11, 4))
    looks = set()
    for relative_error in (0.5, 0.2, 0.14, 0.0):
        drawn = []

        def draw_round(i, drawn=drawn):
            drawn.append(i)
            return TraceTerms(jnp.asarray(samples_RxN[i]), jnp.ones(4), "probes")

        found = sample_until(draw_round, relative_error, 11, min_samples)
        for look in (1, 2, 4, 8, 11):
            seen_N = samples_RxN[:look].ravel()
            low, high = stats.t.interval(0.95, len(seen_N) - 1, seen_N.mean(), stats.sem(seen_N))
            precise = (high - low) / 2 <= relative_error * seen_N.mean()
            if precise and len(seen_N) >= min_samples:
                break
        looks.add(look)
        assert drawn == list(range(look))
        np.testing.assert_array_equal(found.terms, seen_N)
    assert looks == expected
