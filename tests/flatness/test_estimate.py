import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxflat.flatness import Estimate, ratio_estimate


def test_equal_weights_give_the_ordinary_standard_error():
    samples = np.random.default_rng(0).normal(size=9)
    estimate = ratio_estimate(jnp.asarray(5 * samples), jnp.full(9, 5), "seeds")
    np.testing.assert_allclose(estimate.mean, samples.mean(), rtol=1e-12)
    np.testing.assert_allclose(estimate.sem, samples.std(ddof=1) / 3, rtol=1e-12)
    assert (estimate.num_samples, estimate.over) == (9, "seeds")


def test_ratio_standard_error_is_the_spread_of_repeated_ratios():
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 9, size=(4000, 50)).astype(float)
    sums = weights * (2 + rng.normal(size=weights.shape)) + rng.normal(size=weights.shape)
    repeat = jax.vmap(lambda s, w: ratio_estimate(s, w, "sentences"))
    estimates = repeat(jnp.asarray(sums), jnp.asarray(weights))
    spread = np.std(estimates.mean, ddof=1)
    np.testing.assert_allclose(np.sqrt(np.mean(estimates.sem**2)), spread, rtol=0.03)
    np.testing.assert_allclose(np.mean(estimates.mean), 2, atol=4 * spread / np.sqrt(4000))


def test_a_ratio_to_something_negative_has_a_positive_error():
    """The noise scale has such a weight if the estimate of the squared gradient is below 0."""
    sums_n, weights_n = jnp.asarray([1.0, 2.0, 4.0]), jnp.asarray([3.0, 5.0, 2.0])
    above, below = (ratio_estimate(sums_n, s * weights_n, "sentences") for s in (1, -1))
    np.testing.assert_allclose((below.mean, below.sem), (-above.mean, above.sem), rtol=1e-12)
    assert above.sem > 0


@pytest.mark.parametrize("level", [0.68, 0.95])
def test_interval_is_students(level):
    low, high = Estimate(jnp.asarray(3.0), jnp.asarray(0.5), 5, "probes").interval(level)
    np.testing.assert_allclose((low, high), stats.t.interval(level, 4, 3.0, 0.5), rtol=1e-12)


def test_one_sample_has_no_error_bar():
    estimate = ratio_estimate(jnp.asarray([4.0]), jnp.asarray([2.0]), "probes")
    assert float(estimate.mean) == 2
    assert jnp.isnan(estimate.sem)
    assert jnp.isnan(jnp.stack(estimate.interval())).all()
