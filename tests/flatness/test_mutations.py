"""Common mistakes in curvature estimators, made on purpose: a check detects each.

The checks pass without the mistake. Mutated functions are traced afresh, as loss functions that
no other test has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat.flatness import fisher_trace, hessian_trace, hessian_trace_terms, sampling, trace
from tests.support import softmax_table as table

KEY = jax.random.key(3)


def check_hessian_trace(loss_fn, batches):
    """Against the dense Hessian of the noiseless loss of all predictions together."""
    params = table.make_params()
    options = {"num_probes": 10_000, "probes_per_pass": 1000, "over": "probes"}
    found = hessian_trace(loss_fn, params, batches, KEY, **options)
    truth = jnp.trace(table.dense_hessian(params, batches))
    assert found.sem < 0.01 * truth
    assert abs(found.mean - truth) < 4 * found.sem, "off the dense trace"


@pytest.mark.parametrize("noise", ["fixed", "fresh in every microbatch"])
@pytest.mark.slow
def test_dropout(noise):
    batches = table.make_batches(4, 8) | {"index": jnp.arange(4)}

    def with_dropout(rate):
        def loss_fn(params, batch):
            key = KEY if noise == "fixed" else jax.random.fold_in(KEY, batch["index"])
            kept = jax.random.bernoulli(key, 1 - rate, params["table"].shape)
            dropped = jnp.where(kept, params["table"] / (1 - rate), 0)
            return table.loss_fn(params | {"table": dropped}, batch)

        return loss_fn

    check_hessian_trace(with_dropout(0.0), batches)
    with pytest.raises(AssertionError, match="off the dense trace"):
        check_hessian_trace(with_dropout(0.1), batches)


@pytest.mark.slow
def test_means_of_microbatches_averaged():
    """Instead of one sum over predictions; the first microbatch has few predictions."""
    batches = table.make_batches(2, 16)
    batches |= {"weights": batches["weights"].at[0, 2:].set(0)}

    def mean_of_microbatch(params, batch):
        loss_sum, weight = table.loss_fn(params, batch)
        return loss_sum / weight, jnp.asarray(1.0)

    check_hessian_trace(table.loss_fn, batches)
    with pytest.raises(AssertionError, match="off the dense trace"):
        check_hessian_trace(mean_of_microbatch, batches)


def check_fisher_trace(batches):
    """Against the dense Gauss-Newton matrix; one prediction a microbatch, labels drawn once."""
    params = table.make_params()
    found = fisher_trace(lambda p, b: table.log_probs_fn(p, b), params, batches, KEY, num_samples=1)
    truth = jnp.trace(table.dense_gauss_newton(params, batches))
    assert found.sem < 0.05 * truth
    assert abs(found.mean - truth) < 4 * found.sem, "off the dense trace"


@pytest.mark.slow
def test_labels_of_the_data(monkeypatch):
    """Instead of the model's labels; undetected only if the model drew the data."""
    batches = table.make_batches(2000, 1)
    check_fisher_trace(batches)
    log_probs = jax.jit(table.log_probs_fn)(table.make_params(), jax.tree.map(jnp.ravel, batches))[
        0
    ]
    own_labels = jax.random.categorical(KEY, log_probs)
    monkeypatch.setattr(sampling, "draw_labels", lambda key, log_probs, i: own_labels[i][None])
    check_fisher_trace(batches)
    labels = batches["targets"].ravel()
    monkeypatch.setattr(sampling, "draw_labels", lambda key, log_probs, i: labels[i][None])
    with pytest.raises(AssertionError, match="off the dense trace"):
        check_fisher_trace(batches)


NUM_PARAMS = 100_003


def check_identity(dtype):
    """Every probe gives the trace of the identity, to 1e-5."""
    params = jnp.ones(NUM_PARAMS, dtype)

    def loss_fn(params, batch):
        return jnp.sum(params**2) / 2, jnp.asarray(1.0, jnp.float32)

    for function in hessian_trace_terms, trace.hessian_trace_samples:
        found = function(loss_fn, params, jnp.zeros(2), KEY, num_probes=1).total()
        np.testing.assert_allclose(found.mean, NUM_PARAMS, rtol=1e-5)


@pytest.mark.parametrize("mistake", ["inner products", "probes and tangents"])
def test_sums_in_bfloat16(monkeypatch, mistake):
    dtype = jnp.float32 if mistake == "inner products" else jnp.bfloat16
    check_identity(dtype)
    if mistake == "inner products":

        def products(left, right, stacked=None):
            return jax.tree.map(lambda x, y: jnp.sum((x * y).astype(jnp.bfloat16)), left, right)

        monkeypatch.setattr(trace, "leaf_products", products)
    else:
        monkeypatch.setattr(trace, "at_least_float32", lambda tree: tree)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_identity(dtype)
