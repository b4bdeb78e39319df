"""The permutation test is exact: against enumeration, scipy, and by simulation of the null."""

from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from jaxflat.analysis.statistics.permutation import (
    MOST_PERMUTATIONS,
    num_orders,
    permutation_test,
)
from tests.support.counts import in_full

LEVELS = (0.02, 0.05, 0.1)
ONE_OF_FIVE = "one outlier in five"


def draws(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def enumerate_orders(strata_N):
    """Return all orders that exchange units of one stratum only."""
    n = len(strata_N)
    return [o for o in permutations(range(n)) if all(strata_N[i] == strata_N[o[i]] for i in o)]


def enumerated(x_GxN, y_GxN, strata_N):
    """Return r and p by their definition: sums over groups and units, for each order."""

    def centred(values_GxN):
        ranks_GxN = np.zeros_like(values_GxN)
        for group, stratum in product(range(len(values_GxN)), set(strata_N)):
            own = [i for i, one in enumerate(strata_N) if one == stratum]
            ranks_GxN[group, own] = stats.rankdata(values_GxN[group, own])
            ranks_GxN[group, own] -= ranks_GxN[group, own].mean()
        return ranks_GxN

    x_GxN, y_GxN = centred(x_GxN), centred(y_GxN)
    scale = np.sqrt((x_GxN**2).sum() * (y_GxN**2).sum())
    orders = enumerate_orders(strata_N)
    r_P = np.array([(x_GxN[:, list(order)] * y_GxN).sum() / scale for order in orders])
    r = (x_GxN * y_GxN).sum() / scale
    return r, np.mean(np.abs(r_P) > abs(r) - 1e-9)


STRATA = {
    "one": [0, 0, 0, 0, 0],
    "two": [0, 0, 0, 1, 1, 1],
    "mixed order": ["b", "a", "b", "a", "b", "c"],
}


@pytest.mark.parametrize("strata", STRATA.values(), ids=STRATA)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_r_and_p_are_those_of_enumeration(strata, groups, ties):
    for seed in range(5):
        x_GxN, y_GxN = draws(seed, 2, groups, len(strata))
        x_GxN, y_GxN = x_GxN + 0.5 * y_GxN, np.round(y_GxN) if ties else y_GxN
        if np.ptp(y_GxN) == 0:
            continue
        found = permutation_test(x_GxN, y_GxN, np.array(strata))
        assert found == pytest.approx(enumerated(x_GxN, y_GxN, strata))


def spearman(x_N, y_N):
    return stats.spearmanr(x_N, y_N).statistic


@pytest.mark.parametrize("n", [4, 6])
def test_one_group_is_scipys_test_of_pairings(n):
    for seed in range(2):
        x_N, y_N = draws(seed, 2, n)
        r, p = permutation_test(x_N[None], y_N[None], np.zeros(n))
        expected = stats.permutation_test(
            (x_N,),
            lambda x_N, y_N=y_N: abs(spearman(x_N, y_N)),
            permutation_type="pairings",
            alternative="greater",
            n_resamples=np.inf,
        )
        assert r == pytest.approx(spearman(x_N, y_N))
        assert p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("seed", range(4))
def test_eight_units_are_permuted_at_random_with_the_identity_among_the_orders(seed):
    """The rest are 5,039 draws of 40,320 orders, so p has a binomial error."""
    x_N, y_N = draws(seed, 2, 8)
    x_N = x_N + 0.7 * y_N
    assert num_orders(np.zeros(8)) == 40_320 > MOST_PERMUTATIONS
    p = permutation_test(x_N[None], y_N[None], np.zeros(8))[1]
    ranks = np.array(list(permutations(range(1, 9))), float) - 4.5
    r_P = ranks @ (stats.rankdata(y_N) - 4.5) / 42
    exact = np.mean(np.abs(r_P) > abs(spearman(x_N, y_N)) - 1e-9)
    assert p >= 1 / MOST_PERMUTATIONS
    assert abs(p - exact) < 4 * np.sqrt(exact * (1 - exact) / MOST_PERMUTATIONS) + 1e-3
    assert p == permutation_test(x_N[None], y_N[None], np.zeros(8))[1]  # the same draws


@pytest.mark.parametrize("n", [6, 8, 9])
def test_perfect_agreement_has_a_small_p_and_either_sign(n):
    x_N = np.arange(n, dtype=float)
    r, p = permutation_test(x_N[None], -np.exp(x_N)[None], np.zeros(n))
    assert r == pytest.approx(-1.0)
    assert p <= 2 / min(720, MOST_PERMUTATIONS)


@pytest.mark.parametrize("strata", [[0] * 5, [0, 0, 0, 1, 1]])
@pytest.mark.parametrize("groups", [1, 2])
def test_p_is_exact_over_all_equally_likely_orders_of_the_data(strata, groups):
    """P(p <= a) <= a for every a, where each order of x is the data with the same probability."""
    x_GxN, y_GxN = draws(3, 2, groups, 5)
    p_values = [
        permutation_test(x_GxN[:, list(order)], y_GxN, np.array(strata))[1]
        for order in enumerate_orders(strata)
    ]
    for level in {*p_values, *LEVELS}:
        assert np.mean([p <= level + 1e-12 for p in p_values]) <= level + 1e-12


def with_outliers(random, shape):
    """Draw normal values; one in five is ten times as far off."""
    return random.normal(size=shape) * np.where(random.random(shape) < 0.2, 10.0, 1.0)


DRAWS = {
    "normal": lambda random, shape: random.normal(size=shape),
    "t of one degree": lambda random, shape: random.standard_t(1, size=shape),
    ONE_OF_FIVE: with_outliers,
}


@pytest.mark.parametrize("amount", [300, *in_full(pytest.param(5000, marks=pytest.mark.slow))])
@pytest.mark.parametrize(
    ("strata", "groups"), [([0] * 5, 1), ([0] * 5, 4), ([0] * 4 + [1] * 2, 3), ([0] * 8, 2)]
)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_p_is_rarely_small_under_the_null(amount, strata, groups, draw):
    """Units share a part of their value in all groups, and strata differ in both measures."""
    if len(strata) == 8:
        amount //= 6  # 5,040 orders each
    random, strata_N = np.random.default_rng(5), np.array(strata)
    p_values = []
    for _ in range(amount):
        shared, own = (draw(random, (2, g, len(strata))) for g in (1, groups))
        x_GxN, y_GxN = shared + own + 100.0 * strata_N[None, None, :]
        p_values.append(permutation_test(x_GxN, y_GxN, strata_N)[1])
    shares = {level: float(np.mean(np.array(p_values) <= level)) for level in LEVELS}
    print(f"P(p <= a), {len(strata)} units in {len(set(strata))} strata, {groups} groups: {shares}")
    for level, share in shares.items():
        assert share <= level + 3 * np.sqrt(level * (1 - level) / amount)


def test_what_does_not_vary_is_not_associated():
    assert permutation_test(np.ones((2, 5)), draws(0, 2, 5), np.zeros(5)) == (0.0, 1.0)
    assert permutation_test(draws(0, 1, 3), draws(1, 1, 3), np.arange(3)) == (0.0, 1.0)


def test_the_number_of_orders():
    for strata in STRATA.values():
        assert num_orders(np.array(strata)) == len(enumerate_orders(strata))
