"""The error bars of traces against repeated estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflat import flatness
from tests.support import softmax_table
from tests.support import tiny_masked_lm as lm
from tests.support.counts import in_full

KEY = jax.random.key(3)


def assert_within(estimate, truth, num_sems=3):
    assert abs(estimate.mean - truth) < num_sems * estimate.sem


def test_fractional_weights_are_exact_in_the_fisher_trace():
    batches = softmax_table.make_batches(4, 8)
    batches = {**batches, "weights": batches["weights"] * jnp.linspace(0.1, 2.0, 8)[None, :]}
    params = softmax_table.make_params()
    fisher = flatness.fisher_trace(
        softmax_table.log_probs_fn,
        params,
        batches,
        KEY,
        num_samples=4096,
        over="probes",
        samples_per_pass=512,
    )
    assert_within(fisher, jnp.trace(softmax_table.dense_gauss_newton(params, batches)))


def calibration(estimate_fn, truth, num_seeds=2000):
    """(z of the grand mean, coverage of the 95% interval) over seeds."""
    keys = jax.random.split(jax.random.key(7), num_seeds)
    estimates = jax.jit(lambda keys: jax.lax.map(estimate_fn, keys, batch_size=100))(keys)
    low, high = estimates.interval()
    means = np.asarray(estimates.mean)
    z = (means.mean() - float(truth)) / (means.std(ddof=1) / num_seeds**0.5)
    return z, float(jnp.mean((low < truth) & (truth < high)))


def resample(key, pool, num_microbatches):
    """Microbatches drawn with replacement from a pool, which is then the population."""
    size = jax.tree.leaves(pool)[0].shape[0]
    chosen = jax.random.randint(key, (num_microbatches,), 0, size)
    return jax.tree.map(lambda x: x[chosen], pool)


def check_calibration(problem, trace, over, num_draws, num_microbatches):
    """Unbiased and of the stated coverage, with the data fixed or resampled from a pool."""
    pool_size = num_microbatches if over == "probes" else 64
    params, pool = problem.make_params(), problem.make_batches(pool_size, 4)
    dense = problem.dense_hessian if trace == "hessian" else problem.dense_gauss_newton

    def estimate_fn(key):
        data_key, key = jax.random.split(key)
        batches = pool if over == "probes" else resample(data_key, pool, num_microbatches)
        if trace == "hessian":
            return flatness.hessian_trace(
                problem.loss_fn, params, batches, key, num_probes=num_draws, over=over
            )
        return flatness.fisher_trace(
            problem.log_probs_fn, params, batches, key, num_samples=num_draws, over=over
        )

    z, coverage = calibration(estimate_fn, jnp.trace(dense(params, pool)))
    print(f"{problem.__name__} {trace} {over}: z {z:.2f}, coverage {coverage:.4f}")
    assert abs(z) < 3
    assert 0.93 < coverage < 0.97


@pytest.mark.parametrize(
    ("problem", "trace", "num_samples", "over"),
    [
        (softmax_table, "hessian", 16, "probes"),
        (softmax_table, "hessian", 16, "probes+sentences"),
        (softmax_table, "fisher", 64, "probes+sentences"),
        (lm, "fisher", 64, "probes"),
        *in_full(
            (lm, "hessian", 16, "probes+sentences"),
            (softmax_table, "fisher", 64, "probes"),
            (lm, "hessian", 16, "probes"),
            (lm, "fisher", 64, "probes+sentences"),
        ),
    ],
)
@pytest.mark.slow
def test_calibration(problem, trace, num_samples, over):
    """Fisher samples are squared norms and skewed: intervals of 16 cover only 92-93%."""
    num_draws, num_microbatches = (num_samples, 2) if over == "probes" else (1, num_samples)
    check_calibration(problem, trace, over, num_draws, num_microbatches)


def test_one_microbatch_has_no_error_over_sentences():
    params, batches = softmax_table.make_params(), softmax_table.make_batches(1, 4)
    with pytest.raises(ValueError, match="at least 2 microbatches"):
        flatness.hessian_trace(softmax_table.loss_fn, params, batches, KEY, num_probes=4)


@pytest.mark.parametrize("function", [flatness.gauss_newton_trace, flatness.fisher_trace])
@pytest.mark.parametrize(
    "log_probs_fn",
    [
        lambda p, b: jax.nn.log_softmax(b * p[None]),
        lambda p, b: (jax.nn.log_softmax(b * p[None]), 1.0),
        lambda p, b: ((b * p[None]).sum(), jnp.ones(())),
    ],
    ids=["no weights", "one weight", "a loss"],
)
def test_log_probs_fn_without_weights_raises(function, log_probs_fn):
    counts = {"num_probes" if function is flatness.gauss_newton_trace else "num_samples": 1}
    with pytest.raises(TypeError, match="log_probs_fn must return log-probabilities"):
        function(log_probs_fn, jnp.ones(3), jnp.ones((2, 5, 3)), KEY, **counts)


@pytest.mark.parametrize("function", [flatness.hessian_trace, flatness.hessian_trace_terms])
def test_loss_fn_without_a_weight_raises(function):
    with pytest.raises(TypeError, match=r"loss_fn must return two scalars \(loss_sum, weight\)"):
        function(lambda p, b: (p * b).sum(), jnp.ones(3), jnp.ones((2, 3)), KEY, num_probes=1)
