"""Sizes are matched by excess loss alone, and compared seed by seed."""

import random
from dataclasses import replace

import numpy as np
import pytest

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare, match_all, match_cells, read_comparison
from jaxflat.analysis.pairs import compare_pair, paired_values
from jaxflat.analysis.results_csv import Row, read_results
from jaxflat.analysis.statistics.intervals import paired_t_interval, tost_paired
from jaxflat.analysis.verdicts import FLATNESS, NONE
from tests.support.simulation import TRACE, Arm, ladder_rows


def cell(step, losses, arm="", **values):
    rows = {
        seed: Row("", {}, seed, step, True, {"excess_loss": loss, **values})
        for seed, loss in losses.items()
    }
    return Cell(arm, step, rows)


def chosen(comparison):
    pairs = [(pair.first.step, pair.second.step) for pair in comparison.pairs]
    return pairs, {name: cell.step for name, cell in comparison.matched.items()}


def test_the_nearest_losses_are_matched():
    smaller = [cell(1, {"0": 0.9, "1": 0.7}), cell(2, {"0": 0.5, "1": 0.3})]
    larger = [cell(3, {"0": 0.6, "1": 0.44}), cell(4, {"0": 0.43, "1": 0.39})]
    first, second = match_cells(smaller, larger)
    assert (first.step, second.step) == (2, 4)


def test_only_shared_seeds_are_compared():
    first, second = match_cells([cell(1, {"0": 0.5, "1": 9.0})], [cell(2, {"0": 0.4, "2": 7.0})])
    assert (first.step, second.step) == (1, 2)
    assert match_cells([cell(1, {"0": 0.5})], [cell(2, {"1": 0.5})]) is None


def test_all_sizes_are_matched_where_their_losses_are_closest_together():
    arms = {
        "a": [cell(1, {"0": 0.9}), cell(2, {"0": 0.5})],
        "b": [cell(3, {"0": 0.8}), cell(4, {"0": 0.51})],
        "c": [cell(5, {"0": 0.52}), cell(6, {"0": 0.1})],
    }
    assert [cell.step for cell in match_all(arms).values()] == [2, 4, 5]


def test_accuracies_and_traces_play_no_part_in_the_choice(sweep):
    rows = read_results(sweep(accuracy=1.5, log_trace=-0.3) / "results.csv")
    others = [{name: value for name, value in row.values.items() if not kept(name)} for row in rows]
    random.Random(0).shuffle(others)
    shuffled = [
        replace(row, values={n: v for n, v in row.values.items() if kept(n)} | values)
        for row, values in zip(rows, others, strict=True)
    ]
    before, after = compare(rows), compare(shuffled)
    assert chosen(before) == chosen(after)
    assert [pair.accuracy for pair in before.pairs] != [pair.accuracy for pair in after.pairs]


def kept(name):
    return name in ("num_params", "excess_loss", "excess_loss_sem")


def test_a_difference_is_larger_minus_smaller_seed_by_seed(sweep):
    pair = read_comparison(sweep(accuracy=1.5)).pairs[0]
    column = "linear_probe/state_3.map/4000"
    values = [list(one.by_seed(column).values()) for one in (pair.first, pair.second)]
    assert pair.first.num_params < pair.second.num_params
    assert pair.secondary[column] == paired_t_interval(*values)


def test_equivalence_allows_for_the_choice_among_nine_pairs(sweep):
    """The log ratio is tested at half the margin, the margin and twice the margin."""
    comparison = read_comparison(sweep())
    cells = [cells[-1] for cells in comparison.arms.values()][:2]
    pair = compare_pair(*cells, comparison.primary_columns, 1.1, candidates=9)
    logs = [np.log(one).tolist() for one in paired_values(*cells, "excess_loss")]
    margins = [test.margin for test in pair.equivalences]
    assert margins == pytest.approx([1.1**0.5, 1.1, 1.1**2])
    for test in pair.equivalences:
        assert test.p == min(1.0, 9 * tost_paired(*logs, np.log(test.margin)).p)


def test_projected_checkpoints_are_compared_with_each_other_only(sweep):
    rows = read_results(sweep() / "results.csv")
    unprojected = [
        replace(row, projected=False, step=row.step + 1) for row in rows if not row.is_lookup_table
    ]
    assert {cell.step for cell in compare(rows + unprojected).cells} == {1000, 2000, 4000}


def with_optimizers(rows, *names):
    return [replace(row, swept=row.swept | {"optimizer.name": n}) for row in rows for n in names]


def test_sizes_are_compared_where_they_differ_in_nothing_else(sweep):
    rows = read_results(sweep() / "results.csv")
    comparison = compare(with_optimizers(rows, "adam", "sgd"))
    assert len(comparison.arms) == 6
    optimizers = [
        [cell.rows["0"].swept["optimizer.name"] for cell in (pair.first, pair.second)]
        for pair in comparison.pairs
    ]
    assert sorted(optimizers) == [["adam"] * 2] * 3 + [["sgd"] * 2] * 3
    small = [row for row in rows if row.swept["model.width"] == "16"]
    large = [row for row in rows if row.swept["model.width"] == "32"]
    comparison = compare(with_optimizers(small, "adam") + with_optimizers(large, "sgd", "momentum"))
    assert "models of different sizes differ in" in comparison.obstacle
    assert comparison.pairs == []
    assert len(comparison.arms) == 3


def test_a_sweep_of_one_size_is_not_compared_by_size(sweep):
    comparison = read_comparison(sweep(widths=(16,)))
    assert "one size only" in comparison.obstacle
    assert comparison.cells


def answers(rows):
    return {one.claim: one.answer for one in judge(compare(rows))}


@pytest.mark.parametrize("effects", [{"accuracy": 1.5, "log_trace": -0.3}, {"accuracy": -1.5}, {}])
def test_an_extra_checkpoint_in_one_seed_changes_no_verdict(sweep, effects):
    rows = read_results(sweep(**effects) / "results.csv")
    last = [row for row in rows if row.seed == "0" and row.step == 4000]
    losses = [row.values | {"excess_loss": 0.9 * row.values["excess_loss"]} for row in last]
    extra = [
        replace(row, step=8000, values=values) for row, values in zip(last, losses, strict=True)
    ]
    assert answers(rows + extra) == answers(rows)
    assert [pair.accuracy.count for pair in compare(rows + extra).pairs] == [5, 5, 5]


def test_an_extra_checkpoint_of_one_size_in_one_seed_changes_no_verdict(sweep):
    rows = read_results(sweep(accuracy=1.5, log_trace=-0.3) / "results.csv")
    (row,) = [r for r in rows if (r.seed, r.step, r.swept["model.width"]) == ("0", 4000, "32")]
    extra = replace(row, step=3000, values=row.values | {"excess_loss": 0.016})
    assert answers([*rows, extra]) == answers(rows)


@pytest.mark.parametrize("effects", [{"accuracy": 1.5, "log_trace": -0.3}, {"accuracy": -1.5}])
def test_a_learning_rate_that_is_swept_beside_width_leaves_the_verdicts_on_sizes(sweep, effects):
    rows = read_results(sweep(**effects) / "results.csv")
    random = np.random.default_rng(0)
    both = [
        replace(
            row,
            swept=row.swept | {"phases.pretrain.schedule.learning_rate": rate},
            values={name: v * np.exp(0.002 * random.normal()) for name, v in row.values.items()}
            | {name: v for name, v in row.values.items() if name == "num_params"},
        )
        for row in rows
        for rate in ("0.001", "0.003")
    ]
    alone, beside = answers(rows), answers(both)
    for word in ("more accurate", "flatter"):
        claim = f"At equal excess loss the larger model is the {word}"
        assert beside[claim] == alone[claim] != "no verdict"
    assert len(compare(both).pairs) == 6


WIDTHS = [Arm({"model.width": str(width)}, num_params=float(width)) for width in (16, 32)]


def test_a_trace_that_is_missing_at_one_checkpoint_does_not_change_the_measure():
    """The embedded trace, which says the opposite, does not take the invariant one's place."""
    rows = ladder_rows(np.random.default_rng(0), WIDTHS, seeds=5)
    for row in rows:
        row.values["hessian_trace@embedded"] = 1 / row.values[TRACE]
        if row.step == 2000 and row.swept["model.width"] == "32":
            del row.values[TRACE]
    found = next(one for one in judge(compare(rows)) if one.kind == FLATNESS)
    assert found.answer == NONE
    assert "invariant Hessian trace is missing" in found.reason


@pytest.mark.parametrize("key", ["phases.pretrain.schedule.learning_rate", "model.tied_decoder"])
def test_sizes_that_differ_in_something_else_too_are_not_compared(key):
    arms = [replace(arm, swept={**arm.swept, key: str(place)}) for place, arm in enumerate(WIDTHS)]
    comparison = compare(ladder_rows(np.random.default_rng(0), arms, seeds=5))
    assert comparison.pairs == []
    assert comparison.obstacle == f"models of different sizes differ in {key} too"
