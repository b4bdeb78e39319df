"""Permutation tests of an association between two measures."""

from itertools import permutations
from math import factorial, prod

import numpy as np

from jaxflat.analysis.statistics.correlation import ranks

MOST_PERMUTATIONS = 5040
"""With more permutations than these, as many are drawn at random."""


def permutation_test(
    x_GxN: np.ndarray, y_GxN: np.ndarray, strata_N: np.ndarray
) -> tuple[float, float]:
    """Return (rank correlation of x and y, p of no association), by permutations of the N units.

    Rows (G) are groups, such as settings. Values are replaced by their ranks within the group and
    stratum, less the mean rank, and

        r = sum x y / sqrt(sum x^2 sum y^2)

    over groups and units (Spearman's correlation if there is one group and stratum). A permutation
    exchanges units within their stratum, and is the same in all groups, so units keep what their
    values in different groups share. If x and y are not associated, and the units of a stratum are
    exchangeable, every permutation is as probable as the data. p is the share of permutations
    whose |r| is at least as large, the identity included (Fisher 1935, The Design of Experiments;
    random permutations: Phipson and Smyth 2010, arXiv:1603.05766).
    r = 0 and p = 1 if x or y does not vary.
    """
    x_GxN, y_GxN = (_centred_ranks(np.asarray(v, float), strata_N) for v in (x_GxN, y_GxN))
    scale = float(np.sqrt((x_GxN**2).sum() * (y_GxN**2).sum()))
    if scale == 0:
        return 0.0, 1.0
    cross_NxN = x_GxN.T @ y_GxN  # sum over groups of x of one unit and y of another
    orders_PxN = _orders(strata_N)
    sums_P = cross_NxN[orders_PxN, np.arange(len(strata_N))[None, :]].sum(1)
    observed = float(np.trace(cross_NxN))
    tolerance = 1e-12 * float(np.abs(cross_NxN).sum())
    return observed / scale, float(np.mean(np.abs(sums_P) >= abs(observed) - tolerance))


def num_orders(strata_N: np.ndarray) -> int:
    """Return the number of permutations within strata."""
    _, counts = np.unique(strata_N, return_counts=True)
    return prod(factorial(count) for count in counts)


def _centred_ranks(values_GxN: np.ndarray, strata_N: np.ndarray) -> np.ndarray:
    ranks_GxN = np.empty_like(values_GxN)
    for stratum in np.unique(strata_N):
        own_N = strata_N == stratum
        own_ranks_GxM = ranks(values_GxN[:, own_N])
        ranks_GxN[:, own_N] = own_ranks_GxM - own_ranks_GxM.mean(1, keepdims=True)
    return ranks_GxN


def _orders(strata_N: np.ndarray) -> np.ndarray:
    """Return permutations within strata, the identity first: all of them, or a random draw."""
    places = [np.flatnonzero(strata_N == stratum) for stratum in np.unique(strata_N)]
    n = len(strata_N)
    if num_orders(strata_N) > MOST_PERMUTATIONS:
        random = np.random.default_rng(0)
        orders_PxN = np.tile(np.arange(n), (MOST_PERMUTATIONS, 1))
        for own in places:
            orders_PxN[1:, own] = random.permuted(orders_PxN[1:, own], axis=1)
        return orders_PxN
    orders = [np.arange(n)]
    for own in places:
        orders = [
            _placed(order, own, own[list(one)])
            for order in orders
            for one in permutations(range(len(own)))
        ]
    return np.array(orders)


def _placed(order_N: np.ndarray, own: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    placed_N = order_N.copy()
    placed_N[own] = chosen
    return placed_N
