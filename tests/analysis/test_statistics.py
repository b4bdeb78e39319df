"""Intervals and tests over seeds against scipy, closed forms and simulation."""

import numpy as np
import pytest
from scipy import stats

from jaxflat.analysis.statistics.intervals import (
    Interval,
    log_ratio_interval,
    mean_interval,
    paired_t_interval,
    standard_error,
    tost_paired,
)


def test_standard_error_is_scipys():
    values = [1.0, 4.0, 2.0, 8.0]
    assert standard_error(values) == pytest.approx(stats.sem(values))
    assert standard_error([1.0]) is None


def test_paired_interval_is_scipys():
    first, second = np.random.default_rng(0).normal(size=(2, 5))
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    found = paired_t_interval(first, second)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    shared, noise = random.normal(size=(2000, 5)), random.normal(size=(2, 2000, 5))
    first, second = shared + noise[0], shared + 0.7 + noise[1]
    found = [paired_t_interval(*pair) for pair in zip(first, second, strict=True)]
    assert 0.93 < np.mean([one.low <= 0.7 <= one.high for one in found]) < 0.97


def test_interval_of_one_value_has_no_ends_and_takes_no_side():
    found = mean_interval([3.0])
    assert found == Interval(3.0, None, None, 1)
    assert found.half_width is None
    assert found.side(0.0) == 0


@pytest.mark.parametrize(("ends", "side"), [((0.1, 0.3), 1), ((-0.3, -0.1), -1), ((-0.1, 0.2), 0)])
def test_side_is_symmetric(ends, side):
    assert Interval(0.0, *ends, 5).side(0.0) == side


def test_log_ratio_turns_over_when_the_roles_are_exchanged():
    first, second = np.exp(np.random.default_rng(2).normal(size=(2, 5)))
    one, other = log_ratio_interval(first, second), log_ratio_interval(second, first)
    assert one.mean == pytest.approx(stats.gmean(second) / stats.gmean(first))
    assert (one.low, one.high) == pytest.approx((1 / other.high, 1 / other.low))


def test_log_ratio_of_a_value_that_has_no_logarithm():
    assert log_ratio_interval([1.0, -0.1], [1.0, 2.0]) is None


@pytest.mark.parametrize("shift", [0.0, 0.001, -0.003])
def test_tost_is_the_larger_of_two_one_sided_tests(shift):
    first, second = np.random.default_rng(3).normal(scale=1e-3, size=(2, 5))
    second, margin = second + shift, 0.002
    above = stats.ttest_rel(second, first - margin, alternative="greater").pvalue
    below = stats.ttest_rel(second, first + margin, alternative="less").pvalue
    assert tost_paired(first, second, margin).p == pytest.approx(max(above, below))


def test_tost_rarely_calls_a_difference_of_the_margin_none():
    random = np.random.default_rng(4)
    draws = random.normal(0.002, 4e-4, size=(4000, 5))
    wrong = np.mean([tost_paired(np.zeros(5), draw, 0.002).holds for draw in draws])
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(draws))


def test_tost_usually_recognises_equal_means():
    draws = np.random.default_rng(5).normal(0.0, 4e-4, size=(500, 5))
    assert np.mean([tost_paired(np.zeros(5), draw, 0.002).holds for draw in draws]) > 0.95


def test_tost_without_noise_and_with_one_pair():
    assert tost_paired([1.0, 2.0], [1.5, 2.5], 0.6).holds
    assert not tost_paired([1.0, 2.0], [1.5, 2.5], 0.5).holds
    alone = tost_paired([1.0], [1.0], 0.5)
    assert alone.p is None
    assert not alone.holds
