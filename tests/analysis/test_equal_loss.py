"""Runs read at equal excess loss give the planted difference, without bias and with its error."""

from dataclasses import replace

import numpy as np
import pytest

from jaxflat.analysis.cells import Cell, group_cells
from jaxflat.analysis.equal_loss import NUM_LEVELS, at_equal_loss, seeds_at_equal_loss
from jaxflat.analysis.results_csv import Row
from jaxflat.analysis.statistics.intervals import log_ratio_interval, paired_t_interval
from tests.support.counts import in_full
from tests.support.simulation import PROBE, TRACE, Arm, ladder_rows, share_covering

TRACE_SEM = f"{TRACE}_sem"


def two_arms(excess=1.5, points=0.8, halvings=0.4):
    return [Arm({"x": "a"}), Arm({"x": "b"}, points, halvings, excess)]


def read_arms(rows):
    return at_equal_loss(list(group_cells(rows).values()))


def run(seed, losses, arm="a", language="", **columns):
    """Return the rows of a run; each column has one value for each loss."""
    return [
        Row(
            f"{arm},{seed}",
            {"x": arm},
            seed,
            step=100 * (place + 1),
            projected=True,
            values={"num_params": 10.0, "excess_loss": loss}
            | {name: values[place] for name, values in columns.items()},
            language=language,
        )
        for place, loss in enumerate(losses)
    ]


@pytest.mark.parametrize("amount", [150, *in_full(pytest.param(2000, marks=pytest.mark.slow))])
@pytest.mark.parametrize("excess", [1.0, 1.5, 0.5])
def test_the_planted_difference_is_found_without_bias_and_covered(amount, excess):
    """Arms reach other losses at the same step: half to twice those of the baseline."""
    random = np.random.default_rng(0)
    differences, ratios = [], []
    for _ in range(amount):
        first, second = read_arms(ladder_rows(random, two_arms(excess)))
        values = [[list(one.by_seed(name).values()) for one in (first, second)] for name in COLUMNS]
        differences.append(paired_t_interval(*values[0]))
        ratios.append(log_ratio_interval(*values[1]))
    estimates = [
        [(100 * one.mean - 0.8) for one in differences],
        [-np.log2(one.mean) - 0.4 for one in ratios],
    ]
    z = [np.mean(one) / np.std(one, ddof=1) * np.sqrt(amount) for one in estimates]
    covered = [share_covering(differences, 0.008), share_covering(ratios, 0.5**0.4)]
    print(f"excess x{excess}: z {z[0]:+.2f} {z[1]:+.2f}, covered {covered[0]:.3f} {covered[1]:.3f}")
    assert max(map(abs, z)) < 3
    chance = 0.0 if amount >= 2000 else 3 * np.sqrt(0.95 * 0.05 / amount)
    assert all(0.93 - chance <= one <= 0.97 + chance for one in covered)


COLUMNS = (PROBE, TRACE)


@pytest.mark.parametrize("excess", [1.0, 1.3, 0.6])
def test_without_noise_the_difference_is_exact(excess):
    arms = two_arms(excess)
    rows = ladder_rows(np.random.default_rng(1), arms, noise=0.0, scatter=0.0, loss_noise=0.0)
    first, second = read_arms(rows)
    for seed in map(str, range(8)):
        left, right = first.rows[seed].values, second.rows[seed].values
        assert left["excess_loss"] == pytest.approx(right["excess_loss"], rel=1e-12)
        assert right[PROBE] - left[PROBE] == pytest.approx(0.008, abs=1e-12)
        assert right[TRACE] / left[TRACE] == pytest.approx(0.5**0.4, rel=1e-12)


def test_values_are_means_of_numpys_interpolation_over_the_levels_of_a_seed():
    """Excess losses and traces are interpolated as logarithms, other columns as they are."""
    random = np.random.default_rng(2)
    losses = {"a": [0.09, 0.03, 0.011], "b": [0.05, 0.02, 0.04, 0.007]}  # one is not sorted
    rows, expected = [], {}
    levels_L = np.linspace(np.log(0.011), np.log(0.05), NUM_LEVELS)
    for arm, own in losses.items():
        order = np.argsort(own)
        columns = {PROBE: random.random(len(own)), TRACE: np.exp(random.normal(size=len(own)))}
        rows += run("0", own, arm, **columns)
        levels = [
            np.interp(levels_L, np.log(own)[order], values[order])
            for values in (columns[PROBE], np.log(columns[TRACE]))
        ]
        expected[arm] = levels[0].mean(), np.exp(levels[1].mean()), np.exp(levels_L.mean())
    for cell in read_arms(rows):
        found = [cell.rows["0"].values[name] for name in (*COLUMNS, "excess_loss")]
        assert found == pytest.approx(expected[cell.arm[-1]], rel=1e-12)


def test_a_trace_that_is_not_positive_is_interpolated_as_it_is():
    rows = run("0", [0.04, 0.01], "a", **{TRACE: [-1.0, 3.0]})
    rows += run("0", [0.04, 0.01], "b", **{TRACE: [1.0, 2.0]})
    first, second = read_arms(rows)
    assert first.rows["0"].values[TRACE] == pytest.approx(1.0)
    assert second.rows["0"].values[TRACE] == pytest.approx(np.sqrt(2.0))


def test_the_standard_error_of_an_interpolated_value_is_an_upper_bound():
    """True errors: a relative 2% at each checkpoint, independent, equal or opposite."""
    random, amount, sem = np.random.default_rng(3), 4000, 0.02
    losses, traces = np.array([0.05, 0.02, 0.01]), np.array([80.0, 50.0, 30.0])
    columns = {TRACE: traces, TRACE_SEM: sem * traces, PROBE: [0.8] * 3, f"{PROBE}_sem": [sem] * 3}
    rows = run("0", losses, "a", **columns) + run("0", [0.06, 0.008], "b")
    cell, _ = read_arms(rows)
    values = cell.rows["0"].values
    levels_L = np.linspace(np.log(0.01), np.log(0.05), NUM_LEVELS)
    weights_K = [np.interp(levels_L, np.log(losses[::-1]), u).mean() for u in np.eye(3)][::-1]
    signs = {"independent": random.normal(size=(amount, 3))}
    signs["equal"] = np.tile(random.normal(size=(amount, 1)), 3)
    for errors in signs.values():
        logs = (np.log(traces) + sem * errors) @ weights_K
        assert np.std(np.exp(logs)) <= 1.05 * values[TRACE_SEM]
        assert np.std(sem * errors @ weights_K) <= 1.05 * values[f"{PROBE}_sem"]
    assert values[f"{PROBE}_sem"] == pytest.approx(sem)


def test_losses_that_do_not_overlap_are_not_compared():
    rows = run("0", [0.09, 0.05], "a") + run("0", [0.04, 0.01], "b")
    assert read_arms(rows) is None
    rows = run("0", [0.09, 0.04], "a") + run("0", [0.04, 0.01], "b")
    assert [cell.mean("excess_loss") for cell in read_arms(rows)] == pytest.approx([0.04] * 2)


def test_one_checkpoint_and_a_loss_of_zero_give_no_common_range():
    assert read_arms(run("0", [0.05], "a") + run("0", [0.09, 0.01], "b")) is None
    assert read_arms(run("0", [0.05, 0.0], "a") + run("0", [0.09, 0.01], "b")) is None


@pytest.mark.parametrize("apart", range(5))
def test_a_seed_without_overlap_is_left_out_and_more_than_half_of_them_give_none(apart):
    rows = []
    for seed in range(4):
        low = 0.06 if seed < apart else 0.01
        rows += run(str(seed), [0.09, low], "a") + run(str(seed), [0.05, 0.008], "b")
    read = read_arms(rows)
    if apart > 2:
        assert read is None
    else:
        seeds = [str(seed) for seed in range(apart, 4)]
        assert [list(cell.rows) for cell in read] == [seeds, seeds]


def test_a_start_that_arms_share_is_not_read():
    """It was measured before the arms differ, so it would shrink their difference."""
    start = {PROBE: [0.5], TRACE: [90.0]}
    rows = []
    for arm, ends in (("a", (0.80, 0.90)), ("b", (0.82, 0.92))):
        own = run("0", [0.04, 0.02], arm, **{PROBE: ends, TRACE: [40.0, 30.0]})
        rows += run("0", [0.08], arm, **start) + [replace(row, step=row.step + 100) for row in own]
    first, second = read_arms(rows)
    assert second.mean(PROBE) - first.mean(PROBE) == pytest.approx(0.02)
    assert first.mean("excess_loss") == pytest.approx(np.sqrt(0.04 * 0.02))
    shared = [row for row in rows if row.step == 100]
    assert read_arms(shared) is None


def test_seeds_are_read_at_common_losses_in_each_language_alone():
    """Languages differ in their losses, so their seeds have no range in common."""
    rows = []
    for language, level in (("7", 0.01), ("8", 1.0)):
        for seed in range(3):
            losses = [level * (4.0 + seed), level * (1.0 + 0.1 * seed)]
            rows += run(f"{seed} of language {language}", losses, language=language)
    (cells,) = group_cells(rows).values()
    losses = seeds_at_equal_loss(cells).by_seed("excess_loss")
    for language, level in (("7", 0.01), ("8", 1.0)):
        own = [loss for seed, loss in losses.items() if seed.endswith(language)]
        assert own == pytest.approx([np.sqrt(4.0 * 1.2) * level] * 3)
    apart = [*rows, *run("9 of language 7", [0.5, 0.2], language="7")]
    (cells,) = group_cells(apart).values()
    assert seeds_at_equal_loss(cells) is None


def test_a_column_that_one_checkpoint_lacks_is_left_out():
    rows = run("0", [0.04, 0.01], "a", **{PROBE: [0.8, 0.9]}) + run("0", [0.05, 0.02], "b")
    del rows[1].values[PROBE]
    first, _ = read_arms(rows)
    assert isinstance(first, Cell)
    assert PROBE not in first.rows["0"].values
