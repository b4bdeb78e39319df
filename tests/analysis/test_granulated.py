"""Granulated Kendall and conditional information against enumeration, and in extreme cases."""

from itertools import combinations, product
from math import log

import numpy as np
import pytest

from jaxflat.analysis.statistics.granulated import (
    chance_score,
    conditional_information,
    granulated_kendall,
    information_score,
)

WIDTHS, RATES = zip(*product(["8", "16", "32"], ["a", "b"]), strict=True)
AXES = {"width": WIDTHS, "rate": RATES}


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_granulated_kendall_by_enumeration_of_pairs():
    x, y = draws(2, 6)
    places = list(zip(WIDTHS, RATES, strict=True))

    def concordance(pairs):
        return np.mean([np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs])

    by_axis = []
    for axis in (0, 1):
        groups = {}
        for i, j in combinations(range(6), 2):
            if places[i][1 - axis] == places[j][1 - axis]:
                groups.setdefault(places[i][1 - axis], []).append((i, j))
        by_axis.append(np.mean([concordance(pairs) for pairs in groups.values()]))
    found = granulated_kendall(x, y, AXES)
    assert found is not None
    assert [float(one) for one in found.by_axis.values()] == pytest.approx(by_axis)
    assert float(found.mean_x) == pytest.approx(np.mean(by_axis))
    assert found.num_pairs == 2 * 3 + 3


def test_granulated_kendall_sees_what_one_axis_hides_from_the_others():
    """Accuracy rises with the measure along the rate, and falls with it along the width."""
    width, rate = np.repeat([0.0, 10.0, 20.0], 2), np.tile([0.0, 1.0], 3)
    found = granulated_kendall(width + rate, -width + rate, AXES)
    assert found is not None
    assert {name: float(one) for name, one in found.by_axis.items()} == {"width": -1.0, "rate": 1.0}
    assert float(found.mean_x) == 0.0


def test_axes_without_pairs_take_no_part():
    x, y = draws(2, 4, seed=1)
    axes = {"width": ["8", "8", "16", "16"], "step": ["1", "2", "3", "4"]}
    found = granulated_kendall(x, y, axes)
    assert found is not None
    assert list(found.by_axis) == ["step"]
    assert granulated_kendall(x, y, {"a": ["1", "2", "3", "4"], "b": ["1", "2", "3", "4"]}) is None


def enumerated(accuracy_SxN, measure_SxN, names):
    """Compute the score from probabilities, pair by pair."""
    n = accuracy_SxN.shape[1]
    triples = []
    for accuracy, measure in zip(accuracy_SxN, measure_SxN, strict=True):
        for i, j in product(range(n), repeat=2):
            if i != j:
                u = tuple((AXES[name][i], AXES[name][j]) for name in names)
                triples.append((accuracy[i] > accuracy[j], measure[i] > measure[j], u))

    def share(*places):
        key = [tuple(triple[p] for p in places) for triple in triples]
        return lambda triple: key.count(tuple(triple[p] for p in places)) / len(triples)

    p_vwu, p_vu, p_wu, p_u = share(0, 1, 2), share(0, 2), share(1, 2), share(2)
    information = np.mean([log(p_vwu(t) * p_u(t) / (p_vu(t) * p_wu(t))) for t in triples])
    return information / -np.mean([log(p_vu(t) / p_u(t)) for t in triples])


def test_the_information_score_by_enumeration():
    accuracy, measure = draws(2, 5, 6, seed=3)
    sets = [(), ("width",), ("rate",)]  # both together single out each checkpoint
    shares = {names: enumerated(accuracy, measure, names) for names in sets}
    found = information_score(accuracy, measure, AXES)
    assert found is not None
    assert found.conditions == min(shares, key=lambda names: shares[names])
    assert found.score == pytest.approx(min(shares.values()))


def test_a_measure_that_decides_accuracy_has_all_the_information():
    accuracy = draws(5, 6, seed=4)
    for measure in (accuracy**3, -accuracy):
        found = information_score(accuracy, measure, AXES)
        assert found is not None
        assert found.score == pytest.approx(1.0)


def test_an_independent_measure_has_none():
    accuracy, measure = draws(2, 4000, 6, seed=5)
    found = information_score(accuracy, measure, AXES)
    assert found is not None
    assert found.score < 1e-3


def test_a_measure_that_only_tells_the_hyper_parameter_has_none_given_it():
    width = np.repeat([0.0, 10.0, 20.0], 2)
    measure = width + 0.1 * draws(2000, 6, seed=6)
    accuracy = width + draws(2000, 6, seed=7)
    without = information_score(accuracy, measure, {})
    assert without is not None
    assert without.score > 0.1
    found = information_score(accuracy, measure, AXES)
    assert found is not None
    assert found.conditions == ("width",)
    assert found.score < 1e-3


def test_conditional_information_of_known_distributions():
    v, w = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert conditional_information(v, w, np.zeros(4)) == pytest.approx(0)
    assert conditional_information(v, v, w) == pytest.approx(1)
    assert conditional_information(v, w, v ^ w) == pytest.approx(1)  # exclusive or
    assert np.isnan(conditional_information(v, w, v))


def test_few_pairs_have_information_by_chance():
    accuracy, measure = draws(2, 2, 4, seed=8)
    axes = {"width": ["8", "8", "16", "16"]}
    assert chance_score(accuracy, measure, axes) > 0.02
    assert chance_score(*draws(2, 2000, 4, seed=9), axes, 2) < 1e-3
