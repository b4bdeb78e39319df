"""Correlations against scipy and closed forms, and their intervals near +-1."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from jaxflat.analysis.statistics.correlation import (
    kendall,
    kendall_interval,
    partial_correlation,
    partial_spearman,
    spearman,
    spearman_grid,
    spearman_interval,
)
from jaxflat.analysis.statistics.intervals import mean_interval


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_and_kendall_are_scipys(ties):
    x, y = draws(2, 20, 7)
    if ties:
        x, y = np.round(x), np.round(y)
    for one, found in ((stats.spearmanr, spearman(x, y)), (stats.kendalltau, kendall(x, y))):
        assert found == pytest.approx([one(*pair).statistic for pair in zip(x, y, strict=True)])


def test_what_does_not_vary_has_no_correlation():
    constant, y = np.ones(6), draws(6)
    assert np.isnan([spearman(constant, y), kendall(constant, y), kendall(y, constant)]).all()
    assert np.isnan(partial_correlation(y, draws(6, seed=1), y[:, None]))


def test_kendall_is_the_weighted_mean_of_its_parts_over_disjoint_pairs():
    x, y = draws(2, 6, seed=2)
    setting = np.array([0, 0, 1, 1, 2, 2])
    within = (setting[:, None] == setting[None, :]) & ~np.eye(6, dtype=bool)
    parts = 3 * kendall(x, y, within) + 12 * kendall(x, y, setting[:, None] != setting[None, :])
    assert parts / 15 == pytest.approx(float(kendall(x, y)))


def test_partial_correlation_of_gaussians_is_that_of_the_precision_matrix():
    """rho_xy.z = -P_xy / sqrt(P_xx P_yy), P the inverse of the covariance."""
    covariance = np.array(
        [[2, 0.9, 1.2, 0.1], [0.9, 1, 0.3, -0.2], [1.2, 0.3, 1, 0], [0.1, -0.2, 0, 1]]
    )
    sample = draws(200_000, 4) @ np.linalg.cholesky(covariance).T
    precision = np.linalg.inv(covariance)
    expected = -precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1])
    found = partial_correlation(sample[:, 0], sample[:, 1], sample[:, 2:])
    assert float(found) == pytest.approx(expected, abs=0.01)


def test_partial_correlation_is_that_of_regression_residuals_and_the_recursion():
    x, y, z = draws(3, 9, seed=3)
    residuals = [a - np.polyval(np.polyfit(z, a, 1), z) for a in (x, y)]
    found = float(partial_correlation(x, y, z[:, None]))
    assert found == pytest.approx(np.corrcoef(residuals)[0, 1])
    (_, xy, xz), (_, _, yz), _ = np.corrcoef([x, y, z])
    assert found == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))


def test_partial_correlation_does_not_change_with_scale_or_a_covariate_given_twice():
    x, y, z = draws(3, 8, seed=4)
    once = partial_correlation(x, y, z[:, None])
    assert partial_correlation(1e6 * x + 3, y, np.stack([z, 2 * z + 1e3], 1)) == pytest.approx(once)
    assert partial_correlation(x, y, np.ones((8, 1))) == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_partial_correlation_needs_two_degrees_of_freedom():
    x, y = draws(2, 5)
    assert np.isfinite(partial_correlation(x, y, draws(5, 2, seed=1)))
    assert np.isnan(partial_correlation(x, y, draws(5, 3, seed=1)))


def test_partial_spearman_removes_what_a_third_measure_explains():
    z = draws(2000, 30)
    x, y = z + draws(2000, 30, seed=1), np.exp(z + draws(2000, 30, seed=2))
    assert spearman(x, y).mean() > 0.4
    assert abs(partial_spearman(x, y, z[..., None]).mean()) < 0.03


def test_intervals_are_students_over_seeds_where_the_grid_is_fine():
    r = np.array([0.1, 0.4, -0.2, 0.3, 0.2])
    expected, found = mean_interval(r.tolist()), kendall_interval(r, 10**6)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )
    expected, found = mean_interval(np.arctanh(r).tolist()), spearman_interval(r, 1000)
    assert found is not None
    assert found.low == pytest.approx(np.tanh(expected.low))
    assert found.high == pytest.approx(np.tanh(expected.high))


def test_seeds_that_agree_exactly_agree_to_within_the_grid():
    tau, r = kendall_interval(np.ones(5), 15), spearman_interval(-np.ones(5), 6)
    assert tau is not None
    assert r is not None
    assert tau.high == 1.0
    assert tau.low == pytest.approx(1 - stats.t.ppf(0.975, 4) * 2 / 15 / np.sqrt(12 * 5))
    assert r.mean == pytest.approx(-1 + spearman_grid(6) / 2)
    assert -1 < r.low < r.mean < r.high < -0.9


def test_an_interval_turns_over_with_the_sign():
    r = np.array([1.0, 0.2, -0.3, 0.6, 0.8])
    for found in (lambda x: spearman_interval(x, 6), lambda x: kendall_interval(x, 15)):
        assert (found(r).low, found(r).high) == pytest.approx((-found(-r).high, -found(-r).low))


@pytest.mark.parametrize("interval", [spearman_interval, kendall_interval])
def test_no_ends_with_one_seed_and_nothing_with_none(interval):
    alone = interval([0.5, np.nan], 6)
    assert alone.mean == pytest.approx(0.5)
    assert (alone.low, alone.high, alone.count) == (None, None, 1)
    assert interval([np.nan], 6) is None
    assert interval([], 6) is None


@pytest.mark.parametrize("n", [3, 5, 6])
def test_the_grid_is_the_distance_of_neighbouring_values(n):
    y = np.array([list(order) for order in permutations(range(n))])
    for found, grid in ((spearman, spearman_grid(n)), (kendall, 2 / (n * (n - 1) // 2))):
        values = np.unique(np.round(found(np.arange(n), y), 9))
        assert np.diff(values).min() == pytest.approx(grid)
