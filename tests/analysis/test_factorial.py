"""The effect of each factor has its planted value and interval, or a reason why there is none."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from jaxflat.analysis.cells import group_cells
from jaxflat.analysis.comparison import compare
from jaxflat.analysis.factorial import factor_effects
from jaxflat.analysis.page.factor_tables import effects_table, factor_lines, factor_tables
from jaxflat.analysis.plan import UNDECLARED
from jaxflat.analysis.results_csv import add_task_means
from tests.support.counts import in_full
from tests.support.simulation import PROBE, TRACE, Arm, ladder_rows, share_covering

WIDTH, RATE, TARGETS = "model.width", "phases.a.schedule.learning_rate", "phases.a.targets"
LEVELS = {WIDTH: ("32", "64"), RATE: ("0.002", "0.010"), TARGETS: ("exact", "sampled")}
POINTS = {WIDTH: 0.6, RATE: -0.3, TARGETS: 0.2, "interaction": 0.5}
HALVINGS = {WIDTH: 0.1, RATE: 0.5, TARGETS: 0.3, "interaction": 0.4}
COMBINATIONS = tuple(product(*LEVELS.values()))
LOG_EXCESS = {WIDTH: -0.3, RATE: -0.2, TARGETS: 0.3, "interaction": 0.0}
QUIET = {"noise": 0.0, "scatter": 0.0, "loss_noise": 0.0}


def planted(effects, levels):
    """Return the sum of the effects of the second levels; the rate interacts with the targets."""
    second = {key: level == LEVELS[key][1] for key, level in levels.items()}
    second["interaction"] = second[RATE] and second[TARGETS]
    return sum(effects[name] for name in effects if second[name])


def arms(combinations=COMBINATIONS):
    swept = [dict(zip(LEVELS, levels, strict=True)) for levels in combinations]
    return [
        Arm(
            one,
            planted(POINTS, one),
            planted(HALVINGS, one),
            float(np.exp(planted(LOG_EXCESS, one))),
            num_params=float(one[WIDTH]),
        )
        for one in swept
    ]


def rows(seed=0, combinations=COMBINATIONS, **noise):
    return ladder_rows(np.random.default_rng(seed), arms(combinations), **noise)


def effects_of(made):
    """Return the effects by factor, other factor and its levels."""
    add_task_means(made, UNDECLARED)
    found = factor_effects(group_cells(made))
    assert found
    return {
        (one.factor.key, one.other.key if one.other else "", one.levels): one
        for one in [*found.main, *found.conditional]
    }


def true_effects():
    """Return (points, halvings, log excess) of each effect: rate and targets share a half."""
    exact, sampled = LEVELS[TARGETS]
    share = {RATE: 0.5, TARGETS: 0.5, WIDTH: 0.0}
    effects = (POINTS, HALVINGS, LOG_EXCESS)
    found = {
        (key, "", ()): [one[key] + share[key] * one["interaction"] for one in effects]
        for key in LEVELS
    }
    found[RATE, TARGETS, (exact,)] = [one[RATE] for one in effects]
    found[RATE, TARGETS, (sampled,)] = [one[RATE] + one["interaction"] for one in effects]
    found[RATE, TARGETS, (exact, sampled)] = [one["interaction"] for one in effects]
    return found


@pytest.mark.parametrize(("name", "truth"), true_effects().items(), ids=str)
def test_without_noise_effects_are_exact(name, truth):
    """At equal steps an effect on the loss also moves trace and accuracy, see `ladder_rows`."""
    points, halvings, log_excess = truth
    one = effects_of(rows(**QUIET))[name]
    for contrast, log in ((one.at_equal_steps, log_excess), (one.at_equal_loss, 0.0)):
        assert contrast.reason == ""
        assert contrast.excess_ratio.mean == pytest.approx(np.exp(log))
        assert contrast.trace_ratio.mean == pytest.approx(0.5**halvings * np.exp(0.5 * log))
        assert contrast.accuracy.mean == pytest.approx(0.01 * (points - 2 * log), abs=1e-12)
        assert contrast.accuracy.count == 8


@pytest.mark.parametrize("amount", [40, *in_full(pytest.param(2000, marks=pytest.mark.slow))])
def test_intervals_cover_the_planted_effects(amount):
    """Of the learning rate and the targets, which interact, at one width."""
    random, one_width, intervals = np.random.default_rng(1), arms(COMBINATIONS[:4]), {}
    for _ in range(amount):
        for name, one in effects_of(ladder_rows(random, one_width, seeds=5)).items():
            points, halvings, log = true_effects()[name]
            for where, shift, contrast in (
                ("equal steps", log, one.at_equal_steps),
                ("equal loss", 0.0, one.at_equal_loss),
            ):
                ratio = 0.5**halvings * np.exp(0.5 * shift)
                of_sweeps = intervals.setdefault((name, where), {})
                for truth, interval in (
                    (0.01 * (points - 2 * shift), contrast.accuracy),
                    (ratio, contrast.trace_ratio),
                ):
                    of_sweeps.setdefault(truth, []).append(interval)
    chance = 0.0 if amount >= 2000 else 3 * np.sqrt(0.95 * 0.05 / amount)
    assert len(intervals) == 2 * 5
    for name, of_sweeps in intervals.items():
        covered = [share_covering(found, truth) for truth, found in of_sweeps.items()]
        print(f"coverage, {name}: accuracy {covered[0]:.3f}, trace {covered[1]:.3f}")
        assert all(0.93 - chance <= one <= 0.97 + chance for one in covered)


def test_every_pair_of_factors_has_an_interaction_once_and_numbers_ascend():
    flipped = rows(combinations=COMBINATIONS[::-1], **QUIET)
    found = effects_of(flipped)
    pairs = [(name[0], name[1]) for name in found if len(name[2]) == 2]
    assert sorted(pairs) == sorted([(WIDTH, RATE), (WIDTH, TARGETS), (RATE, TARGETS)])
    levels = {one.factor.key: one.factor.levels for one in found.values()}
    assert levels == LEVELS | {TARGETS: ("sampled", "exact")}
    expected = effects_of(rows(**QUIET))
    for flip, name in ((1, (RATE, "", ())), (-1, (TARGETS, "", ()))):
        assert found[name].at_equal_loss.accuracy.mean == pytest.approx(
            flip * expected[name].at_equal_loss.accuracy.mean, abs=1e-12
        )


def test_two_languages_are_replicates_in_one_analysis():
    made = []
    for language in ("0", "1"):
        made += [
            replace(row, seed=f"{row.seed} of language {language}", language=language)
            for row in rows(int(language), seeds=3)
        ]
    for one in effects_of(made).values():
        assert one.at_equal_steps.accuracy.count == one.at_equal_loss.accuracy.count == 6


def test_a_sweep_of_one_key_has_no_factors():
    one_width = [row for row in rows() if row.swept[RATE] == "0.002" != row.swept[TARGETS]]
    exact = [row for row in one_width if row.swept[TARGETS] == "exact"]
    assert factor_effects(compare(exact).arms) is None


def with_third_rate(made):
    third = [row for row in made if row.swept[RATE] == "0.010"]
    return made + [replace(row, swept=row.swept | {RATE: "0.05"}) for row in third]


REFUSED = {
    f"{RATE} has 3 values, and a factor needs two": with_third_rate,
    "1 of 8 combinations have no results, such as 64, 0.010, exact": lambda made: [
        row for row in made if tuple(row.swept.values()) != ("64", "0.010", "exact")
    ],
    "no seed has results in every combination": lambda made: [
        row for row in made if (row.swept[WIDTH] == "32") == (row.seed in "0123")
    ],
}


@pytest.mark.parametrize(("why", "change"), REFUSED.items(), ids=REFUSED)
def test_other_designs_are_refused_with_a_reason(why, change):
    comparison = compare(change(rows()))
    found = factor_effects(comparison.arms)
    assert found
    assert found.obstacle == why
    assert found.main == found.conditional == []
    assert factor_lines(found) == [f"There is none, because {why}."]
    assert factor_tables(found) == []


def test_a_seed_that_one_combination_lacks_does_not_count():
    made = [r for r in rows() if r.seed != "3" or r.swept[WIDTH] == "32"]
    for one in effects_of(made).values():
        assert one.at_equal_steps.accuracy.count == one.at_equal_loss.accuracy.count == 7


def test_without_a_common_step_or_loss_there_is_a_reason():
    later = [replace(row, step=row.step + 1) if row.swept[WIDTH] == "64" else row for row in rows()]
    one = effects_of(later)[RATE, "", ()]
    assert one.at_equal_steps.reason == "no step is measured in every combination"
    assert one.at_equal_loss.reason == ""
    apart = [
        replace(row, values=row.values | {"excess_loss": row.values["excess_loss"] / 100})
        if row.swept[TARGETS] == "sampled"
        else row
        for row in rows()
    ]
    found = effects_of(apart)
    assert found[TARGETS, "", ()].at_equal_loss.reason == NO_OVERLAP
    assert found[TARGETS, "", ()].at_equal_steps.reason == ""
    assert found[RATE, "", ()].at_equal_loss.reason == ""
    design = factor_effects(compare(apart).arms)
    assert design
    (row,) = [row for row in effects_table(design, design.main) if row[0].startswith("targets")]
    assert row[4] == NO_OVERLAP
    design = factor_effects(compare(later).arms)
    assert design
    assert factor_lines(design) == ["Equal steps: no step is measured in every combination."]


NO_OVERLAP = "the excess losses of two arms do not overlap"


def test_what_was_not_measured_has_no_interval():
    """A trace that is not positive has no logarithm; here also an accuracy that one seed lacks."""
    made = rows()
    for row in made[:4]:  # one run
        row.values[TRACE] = -1.0
    for row in made:
        if row.seed == "1":
            row.values.pop(PROBE, None)
    one = effects_of(made)[RATE, "", ()]
    assert one.at_equal_loss.trace_ratio is None
    assert one.at_equal_loss.accuracy.count == 7
    assert one.at_equal_steps.accuracy.count == 7
    design = factor_effects(compare(made).arms)
    assert design
    assert effects_table(design, [one])[1][-1] == "; ".join(
        ["8 of loss, 0 of flatness, 7 of accuracy"] * 2
    )


def test_the_table_has_the_numbers():
    comparison = compare(rows(**QUIET))
    found = factor_effects(comparison.arms)
    assert found
    header, *table = effects_table(found, found.main)
    assert [row[0] for row in table] == [
        "width 32 → 64",
        "learning_rate 0.002 → 0.010",
        "targets exact → sampled",
    ]
    rate = dict(zip(header, table[1], strict=True))
    assert rate["Accuracy (points), equal loss"].startswith("−0.05 (")
    assert rate["Where"] == "averaged over the other factors"
    assert rate["Seeds, equal steps; equal loss"] == "8; 8"
    main, conditional = factor_tables(found)
    assert main == [header, *table]
    interaction = dict(zip(conditional[0], conditional[-1], strict=True))
    assert interaction["Where"] == "effect with targets sampled against its effect with exact"
    assert interaction["invariant Hessian trace ratio, equal loss"].startswith("0.76× (")
