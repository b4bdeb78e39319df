"""Simulated sweeps with and without effects: how often the report's intervals are right."""

import numpy as np
import pytest

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare
from jaxflat.analysis.statistics.correlation import (
    kendall,
    kendall_interval,
    partial_spearman,
    spearman,
    spearman_grid,
    spearman_interval,
)
from jaxflat.analysis.statistics.intervals import (
    log_ratio_interval,
    mean_interval,
    paired_t_interval,
)
from jaxflat.analysis.verdicts import NONE, NOT_IDENTIFIED, UNDECIDED
from tests.support.claims import WITHIN
from tests.support.counts import in_full
from tests.support.simulation import SEEDS, SIZES, STEPS, rows_of, share_covering, share_off, sweeps

N = SIZES * STEPS
NUM_PAIRS = N * (N - 1) // 2
SIZES_CLAIMS = (
    "At equal excess loss the larger model is the more accurate",
    "At equal excess loss the larger model is the flatter",
)
AMOUNTS = [2000, *in_full(pytest.param(20_000, marks=pytest.mark.slow))]
EFFECTS = [{}, {"size": 1.0}, {"slope": 0.7}, {"slope": 2.0}]


@pytest.mark.parametrize("num_sweeps", AMOUNTS)
@pytest.mark.parametrize("size", [0.0, 0.8])
def test_paired_differences_and_ratios_cover(num_sweeps, size):
    sharpness, accuracy = sweeps(np.random.default_rng(1), num_sweeps, size=size)
    small, large = accuracy[:, :, 0, 0], accuracy[:, :, 1, 0]
    differences = [paired_t_interval(a, b) for a, b in zip(small, large, strict=True)]
    assert 0.93 < said("coverage, difference", share_covering(differences, size)) < 0.97
    small, large = np.exp(sharpness[:, :, 0, 0]), np.exp(sharpness[:, :, 1, 0])
    ratios = [log_ratio_interval(a, b) for a, b in zip(small, large, strict=True)]
    assert 0.93 < said("coverage, log ratio", share_covering(ratios, np.exp(-size))) < 0.97
    if size == 0:
        assert said("false positives, difference", share_off(differences)) <= 0.06
        assert said("false positives, log ratio", share_off(ratios, 1.0)) <= 0.06


@pytest.mark.parametrize("num_sweeps", AMOUNTS)
@pytest.mark.parametrize("effect", EFFECTS, ids=str)
def test_correlations_cover(num_sweeps, effect):
    """The truth is the mean over many more sweeps, on the scale that the interval averages."""
    for name, found, truth in correlations(np.random.default_rng(2), num_sweeps, effect):
        assert 0.93 < said(f"coverage, {name} {truth:+.2f}", share_covering(found, truth)) < 0.97
        if not effect:
            assert said(f"false positives, {name}", share_off(found)) <= 0.06


@pytest.mark.parametrize("num_sweeps", AMOUNTS)
def test_correlations_that_are_as_strong_as_they_can_be_are_covered(num_sweeps):
    """If most seeds agree on every pair, the grid makes the interval wider than 95%."""
    for name, found, truth in correlations(np.random.default_rng(2), num_sweeps, {"size": 4.0}):
        assert said(f"coverage, {name} {truth:+.2f}", share_covering(found, truth)) > 0.93


def correlations(random, num_sweeps, effect):
    """Return (name, intervals, truth); the truth is the mean over many more sweeps."""
    r_RxS, tau_RxS = of_seeds(*sweeps(random, num_sweeps, **effect))
    many_r_RxS, many_tau_RxS = of_seeds(*sweeps(random, 40_000, **effect))
    most = 1 - spearman_grid(N) / 2
    mean_z = np.arctanh(np.clip(many_r_RxS, -most, most)).mean()
    return [
        ("Spearman", [spearman_interval(r_S, N) for r_S in r_RxS], np.tanh(mean_z)),
        ("Kendall", [kendall_interval(tau_S, NUM_PAIRS) for tau_S in tau_RxS], many_tau_RxS.mean()),
    ]


def of_seeds(sharpness, accuracy):
    x, y = (values.reshape(*values.shape[:2], N) for values in (sharpness, accuracy))
    return spearman(x, y), kendall(x, y)


def said(name, share):
    """Print the share for `pytest -rP`, and return it."""
    print(f"{name}: {share:.3f}")
    return share


@pytest.mark.parametrize("num_sweeps", AMOUNTS)
def test_a_partial_correlation_of_what_only_a_third_measure_joins_is_undecided(num_sweeps):
    loss, noise = sweeps(np.random.default_rng(3), num_sweeps)
    sharpness, _ = sweeps(np.random.default_rng(4), num_sweeps)
    x, y, z = (v.reshape(num_sweeps, SEEDS, N) for v in (loss + sharpness, loss + noise, loss))
    assert share_off([spearman_interval(r_S, N) for r_S in spearman(x, y)]) > 0.3
    partial = partial_spearman(x, y, z[..., None])
    found = [one for r_S in partial if (one := spearman_interval(r_S, N))]
    assert said("false positives, partial Spearman", share_off(found)) <= 0.06


def test_the_percentile_bootstrap_would_not_cover():
    """Why it is not used: with five seeds intervals are too narrow, by sqrt(4/5) and z for t."""
    random = np.random.default_rng(5)
    _, accuracy = sweeps(random, 2000, size=0.8)
    differences_RxS = accuracy[:, :, 1, 0] - accuracy[:, :, 0, 0]
    drawn_BxS = random.integers(SEEDS, size=(1000, SEEDS))
    counts_BxS = (drawn_BxS[..., None] == np.arange(SEEDS)).sum(1)
    low_R, high_R = np.quantile(differences_RxS @ counts_BxS.T / SEEDS, (0.025, 0.975), axis=1)
    coverage = said("coverage, bootstrap", np.mean((low_R <= 0.8) & (high_R >= 0.8)))
    assert 0.78 < coverage < 0.90


def test_spearman_without_fishers_z_would_not_cover():
    """Why z is used: a strong r is skewed, and Student's interval of r covers too rarely."""
    random = np.random.default_rng(8)
    r_RxS, _ = of_seeds(*sweeps(random, 2000, slope=2.0))
    many_RxS, _ = of_seeds(*sweeps(random, 40_000, slope=2.0))
    found = [mean_interval(r_S.tolist()) for r_S in r_RxS]
    assert said("coverage, Spearman without z", share_covering(found, many_RxS.mean())) < 0.93


@pytest.mark.parametrize("num_sweeps", [75, *in_full(pytest.param(2000, marks=pytest.mark.slow))])
def test_verdicts_on_pairs_are_rarely_wrong(num_sweeps):
    """Without an effect, from rows to verdicts; the limit allows 3 binomial errors."""
    counts = count_answers(np.random.default_rng(6), num_sweeps, {})
    allowed = 0.06 + 3 * np.sqrt(0.06 * 0.94 / num_sweeps)
    assert {*counts} == {*SIZES_CLAIMS, WITHIN}
    for claim, answers in counts.items():
        wrong = np.mean([answer != UNDECIDED for answer in answers])
        assert said(f"false positives, {claim}", wrong) <= allowed


@pytest.mark.parametrize(("size", "answer"), [(3.0, "supported"), (-3.0, "contradicted")])
def test_verdicts_on_an_effect_go_its_way(size, answer):
    counts = count_answers(np.random.default_rng(7), 20, {"size": size})
    for claim in SIZES_CLAIMS:
        assert np.mean([one == answer for one in counts[claim]]) > 0.9


def count_answers(random, num_sweeps, effect):
    """Return the answers to each claim, one per sweep that gives a verdict on it."""
    answers = {}
    for made in zip(*sweeps(random, num_sweeps, **effect), strict=True):
        for verdict in judge(compare(rows_of(random, *made))):
            if verdict.answer not in (NONE, NOT_IDENTIFIED):
                answers.setdefault(verdict.claim, []).append(verdict.answer)
    return answers
