"""Correlations of a sweep: by seed, within and across arms, or the reason for none."""

import numpy as np
import pytest
from scipy import stats

from jaxflat.analysis.associations import (
    ACROSS,
    GIVEN_ALL,
    GRANULATED,
    KENDALL,
    SPEARMAN,
    WITHIN,
    associations,
    given_loss,
    statistics,
)
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.loss_scale import EXCESS_LOSS
from jaxflat.analysis.page.evidence import correlations_table, missing_numbers
from jaxflat.analysis.results_csv import PRIMARY_ACCURACY
from tests.analysis.conftest import write_rows


def write_simpson(folder, seeds=5):
    """Write a sweep: flatter is less accurate within a width, and more accurate across widths."""
    random = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for size, width in enumerate((8, 16, 32)):
            for step in (100, 200):
                within = step / 100 + random.normal(0, 0.05)
                rows.append(
                    {
                        **{"point": f"{width},{seed}", "model.width": width},
                        **{"seed": seed, "step": step, "projected": 1, "num_params": width**2},
                        **{"excess_loss": 0.01 + random.normal(0, 0.001)},
                        **{"hessian_trace@embedded": 50 - 10 * size + within},
                        **{"linear_probe/state_3.map/200": 0.5 + 0.1 * size + 0.01 * within},
                    }
                )
    write_rows(folder / "results.csv", rows)
    return folder


def test_one_value_a_seed_is_scipys_over_its_checkpoints(sweep):
    comparison = read_comparison(sweep(accuracy=0.3, log_trace=-0.1))
    one = associations(comparison)[0]
    z = []
    for seed in map(str, range(5)):
        rows = [cell.rows[seed].values for cell in comparison.cells]
        values = [[row[name] for row in rows] for name in (PRIMARY_ACCURACY, one.column)]
        z.append(np.arctanh(stats.spearmanr(*values).statistic))
    assert (one.num_seeds, one.num_checkpoints) == (5, 9)
    assert one.found[SPEARMAN].mean == pytest.approx(np.tanh(np.mean(z)))


def test_simpsons_paradox_is_seen_by_settings(tmp_path):
    one = associations(read_comparison(write_simpson(tmp_path)))[0]
    assert one.found[WITHIN].mean == 1.0
    assert one.found[ACROSS].mean == -1.0
    assert one.found[KENDALL].mean == pytest.approx((3 * 1 - 12 * 1) / 15)
    assert one.found[GRANULATED].mean == 0.0  # steps: +1, widths: -1
    assert one.found[SPEARMAN].high < 0


def test_excess_loss_is_an_association_too_but_not_given_itself(sweep):
    loss = associations(read_comparison(sweep()))[-1]
    assert loss.column == "excess_loss"
    assert loss.found[SPEARMAN].high < 0  # by construction accuracy falls with loss
    assert {given_loss(EXCESS_LOSS), GIVEN_ALL} == loss.missing.keys()


def test_only_seeds_with_every_checkpoint_count(tmp_path):
    path = write_simpson(tmp_path) / "results.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    one = associations(read_comparison(tmp_path))[0]
    assert (one.num_seeds, one.num_checkpoints) == (4, 6)


@pytest.mark.parametrize(
    ("effects", "statistics", "reason"),
    [
        ({"widths": (16,)}, statistics(EXCESS_LOSS), "3 checkpoints per seed are fewer than 4"),
        ({"widths": (16,), "steps": (1, 2, 3, 4)}, (ACROSS,), "only one arm"),
        ({"widths": (8, 16, 24, 32), "steps": (9,)}, (WITHIN,), "each arm has one checkpoint"),
    ],
)
def test_a_number_that_is_missing_has_a_reason(sweep, effects, statistics, reason):
    found = associations(read_comparison(sweep(**effects)))
    assert found
    for one in found:
        assert all(reason in one.missing[name] for name in statistics)
    assert any(reason in text for text in missing_numbers(found))


def test_one_seed_has_numbers_without_intervals(sweep):
    found = associations(read_comparison(sweep(seeds=1)))
    assert all(one.low is None for one in found[0].found.values())
    text = str(correlations_table(found, EXCESS_LOSS))
    assert "one seed, no interval" in text
    assert "nan" not in text


def test_nothing_measured_is_no_association(sweep, tmp_path):
    assert associations(read_comparison(tmp_path)) == []
