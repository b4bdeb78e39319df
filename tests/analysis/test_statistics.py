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
    tost,
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


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("null", [0.0, 0.4, -2.0])
def test_p_of_a_mean_is_scipys(count, null):
    values = np.random.default_rng(6).normal(0.4, 1, count)
    expected = stats.ttest_1samp(values, null).pvalue
    assert mean_interval(values.tolist()).p(null) == pytest.approx(expected)


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("null", [1.0, 0.8, 3.0])
def test_p_of_a_ratio_is_scipys_of_the_logarithms(count, null):
    first, second = np.exp(np.random.default_rng(7).normal(size=(2, count)))
    expected = stats.ttest_1samp(np.log(second / first), np.log(null)).pvalue
    assert log_ratio_interval(first, second).p_ratio(null) == pytest.approx(expected)


def test_p_is_below_5_percent_where_the_interval_takes_a_side():
    for draw in np.random.default_rng(8).normal(1.0, 1.0, (300, 5)):
        one = mean_interval(draw.tolist())
        assert (one.p(0.0) < 0.05) == (one.side(0.0) != 0)
        ratio = log_ratio_interval(np.ones(5), np.exp(draw))
        assert (ratio.p_ratio() < 0.05) == (ratio.side(1.0) != 0)


def test_p_of_one_value_and_of_values_without_scatter():
    assert mean_interval([3.0]).p(0.0) is None
    assert log_ratio_interval([1.0], [3.0]).p_ratio() is None
    same = mean_interval([0.5, 0.5])
    assert (same.p(0.5), same.p(0.0)) == (1.0, 0.0)
    twice = log_ratio_interval([1.0, 1.0], [2.0, 2.0])
    assert (twice.p_ratio(2.0), twice.p_ratio()) == (1.0, 0.0)


@pytest.mark.parametrize("margin", [0.1, 0.5, 2.0])
def test_tost_of_values_is_its_definition(margin):
    values = np.random.default_rng(9).normal(0.2, 0.5, 8)
    se = values.std(ddof=1) / np.sqrt(8)
    above = stats.t.sf((values.mean() + margin) / se, 7)
    below = stats.t.cdf((values.mean() - margin) / se, 7)
    assert tost(values.tolist(), margin).p == pytest.approx(max(above, below))
    assert tost(values.tolist(), margin) == tost_paired(np.zeros(8), values, margin)
