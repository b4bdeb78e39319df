"""Replicates that share a seed are not independent, so one of them counts; languages replicate."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare, read_comparison
from jaxflat.analysis.results_csv import Row, independent_rows, read_results
from tests.analysis.conftest import write_rows
from tests.support.counts import in_full
from tests.support.simulation import PROBE, TRACE


def write_replicates(folder, replicates, widths=(16, 32), effect=0.0):
    """Write two sizes, each measured once per replicate (a dict of seed columns)."""
    random = np.random.default_rng(0)
    rows = [
        {
            **{"point": f"{place},{width}", "model.width": width, **seeds},
            **{"step": step, "projected": 1, "num_params": 60 * width**2},
            "excess_loss": 0.01 * (2000 / step) * np.exp(0.05 * random.normal()),
            TRACE: 80 * np.exp(0.05 * random.normal() - effect * (width == 32)),
            PROBE: 0.9 + 0.003 * random.normal() + 0.05 * effect * (width == 32),
        }
        for place, seeds in enumerate(replicates)
        for width in widths
        for step in (1000, 2000)
    ]
    write_rows(folder / "results.csv", rows)
    return folder


def kept(folder):
    rows = read_results(folder / "results.csv")
    return list(dict.fromkeys(row.seed for row in independent_rows(rows)))


def test_crossed_data_and_initial_seeds_leave_a_diagonal(tmp_path):
    crossed = [{"data_seed": d, "init_seed": i} for d, i in product(range(4), range(4))]
    assert kept(write_replicates(tmp_path, crossed)) == ["0/0", "1/1", "2/2", "3/3"]
    pair, *_ = read_comparison(tmp_path).pairs
    assert pair.accuracy.count == 4


def test_controls_do_not_decide_which_crossed_replicates_are_kept():
    """A lookup table has no initial seed, and may be listed first."""
    values = {"num_params": 1.0, "excess_loss": 0.01}
    table = Row("t", {"model.name": "lookup_table"}, "0", 0, False, dict(values))
    swept = {"model.name": "transformer"}
    models = [Row(seed, swept, seed, 1, False, dict(values)) for seed in ("0/0", "1/1")]
    assert [row.seed for row in independent_rows([table, *models])][-2:] == ["0/0", "1/1"]


def test_crossed_seeds_of_unequal_number_leave_the_smaller_number(tmp_path):
    crossed = [{"data_seed": d, "init_seed": i} for d, i in product(range(2), range(5))]
    assert kept(write_replicates(tmp_path, crossed)) == ["0/0", "1/1"]


@pytest.mark.parametrize(
    "zipped",
    [
        [{"seed": s} for s in range(5)],
        [{"data_seed": s, "init_seed": s + 10} for s in range(5)],
        [{"data_seed": 7, "init_seed": s} for s in range(5)],  # a seed that never varies
        [{"seed": s, "probe_seed": s} for s in range(5)],
    ],
    ids=["seed", "zipped", "one data seed", "probe seed"],
)
def test_replicates_that_share_no_seed_are_all_kept(tmp_path, zipped):
    assert len(kept(write_replicates(tmp_path, zipped))) == 5


def test_seeds_of_different_languages_are_replicates_of_their_own(tmp_path):
    """A seed draws other sentences of another language, so both are kept."""
    crossed = [{"seed": s, "language.seed": g} for s, g in product(range(3), (7, 8))]
    folder = write_replicates(tmp_path, crossed, effect=1.0)
    names = [f"{one['seed']} of language {one['language.seed']}" for one in crossed]
    assert kept(folder) == names
    comparison = read_comparison(folder)
    assert list(comparison.arms) == ["width 16", "width 32"]
    assert comparison.varied == ["model.width"]
    (pair,) = comparison.pairs
    assert pair.accuracy.count == 6
    assert {row.language for row in pair.first.rows.values()} == {"7", "8"}
    assert all("language.seed" not in row.swept for row in pair.first.rows.values())


def test_crossed_seeds_of_each_language_leave_a_diagonal_in_each(tmp_path):
    crossed = [
        {"data_seed": d, "init_seed": i, "language.seed": g}
        for d, i, g in product(range(2), range(2), (7, 8))
    ]
    assert kept(write_replicates(tmp_path, crossed)) == [
        f"{s}/{s} of language {g}" for s in (0, 1) for g in (7, 8)
    ]


@pytest.mark.parametrize("amount", [40, *in_full(pytest.param(1000, marks=pytest.mark.slow))])
def test_crossed_seeds_rarely_give_a_verdict_without_an_effect(tmp_path, amount):
    """A difference between sizes that differs between data seeds has as many replicates as these.

    Taken as independent, the 16 replicates give a verdict in about a third of the sweeps.
    """
    crossed = [{"data_seed": d, "init_seed": i} for d, i in product(range(4), range(4))]
    template = read_results(write_replicates(tmp_path, crossed) / "results.csv")
    random = np.random.default_rng(1)
    wrong = []
    for _ in range(amount):
        of_data = 0.01 * random.normal(size=4)
        rows = []
        for row in template:
            more = of_data[int(row.seed[0])] * (row.swept["model.width"] == "32")
            accuracy = 0.9 + more + 0.003 * random.normal()
            rows.append(replace(row, values=row.values | {PROBE: accuracy}))
        wrong.append(judge(compare(rows))[0].answer != "undecided")
    print(f"crossed seeds: {np.mean(wrong):.3f}")
    assert np.mean(wrong) <= (0.07 if amount >= 1000 else 0.05 + 3 * np.sqrt(0.05 * 0.95 / amount))
