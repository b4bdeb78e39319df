"""Changes from start to end are paired by seed, and described in either direction."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare, read_comparison
from jaxflat.analysis.label_noise import label_noise_test
from jaxflat.analysis.page.findings import left_out_sentences
from jaxflat.analysis.page.joint import matched_pairs
from jaxflat.analysis.page.trajectory_table import trajectory_table
from jaxflat.analysis.results_csv import read_results
from jaxflat.analysis.verdicts import SUPPORTED
from tests.support.pages import read_page
from tests.support.reports import report_of, table_of


def write_arms(workdir, ratios, seeds=5, num_params=(5000, 5000)):
    """Write arms with the same start; `ratios`: the trace, end over start, of (exact, sampled)."""
    random = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        start, start_accuracy = 40 * np.exp(random.normal(0, 0.2)), 0.9 + random.normal(0, 1e-3)
        for targets, ratio, size in zip(("exact", "sampled"), ratios, num_params, strict=True):
            noise = np.exp(random.normal(0, 0.02))
            for step, projected, trace in (
                (4000, 0, start * 1.1),
                (4000, 1, start),
                (8000, 0, 99.0),
                (12_000, 0, start * ratio * noise * 1.5),
                (12_000, 1, start * ratio * noise),
            ):
                ended = targets == "sampled" and step > 4000
                accuracy = 0.9 + 0.01 * ended + random.normal(0, 1e-3)
                rows.append(
                    {
                        **{"point": f"{targets}{seed}", "phases.continue.targets": targets},
                        **{"seed": seed, "step": step, "projected": projected},
                        **{"num_params": size, "excess_loss": 0.002 + 0.0001 * ended},
                        **{"hessian_trace": trace, "hessian_trace@embedded": trace},
                        "linear_probe/root.map/4000": accuracy if step > 4000 else start_accuracy,
                    }
                )
    with (workdir / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return workdir


def test_ratios_are_of_end_over_start_seed_by_seed(tmp_path):
    rows = read_results(write_arms(tmp_path, ratios=(1.0, 0.25)) / "results.csv")
    projected, raw = compare(rows).trajectories
    assert (projected.projected, raw.projected) == (True, False)
    assert [arm.name for arm in projected.arms] == ["targets exact", "targets sampled"]
    assert [(arm.start.step, arm.end.step) for arm in raw.arms] == [(4000, 12_000)] * 2
    exact, sampled = (arm.change.ratio for arm in projected.arms)
    assert exact.low < 1 < exact.high
    assert sampled.mean == pytest.approx(0.25, rel=0.05)
    # Seeds differ by 20%, their ratios by 2%.
    assert sampled.high / sampled.low < 1.2
    ((first, second, change),) = projected.contrasts
    assert (first.name, second.name) == ("targets exact", "targets sampled")
    assert change.ratio.mean == pytest.approx(sampled.mean / exact.mean)
    assert change.accuracy.mean == pytest.approx(0.01, abs=0.003)
    assert change.excess.mean == pytest.approx(0.0001)
    assert change.equal.holds  # the losses at the ends differ by a factor of 1.05
    assert raw.contrasts[0][2].ratio.mean == pytest.approx(change.ratio.mean)


def ratios_of(folder):
    """Return the ratios of the table, of projected checkpoints, by row."""
    comparison = read_comparison(folder)
    header, *rows = trajectory_table(comparison.trajectories)
    place = header.index("embedded Hessian trace ratio")
    return {row[0]: row[place] for row in rows if row[1] == "projected"}


def test_a_fall_and_a_rise_are_shown_alike(tmp_path):
    shown = {}
    for way, ratio in (("fall", 0.25), ("rise", 4.0)):
        folder = tmp_path / way
        folder.mkdir()
        shown[way] = ratios_of(write_arms(folder, ratios=(1.0, ratio)))
        mean = float(shown[way]["targets sampled"].partition("×")[0])
        assert mean == pytest.approx(ratio, rel=0.05)
        contrast = shown[way]["targets sampled against targets exact"]
        assert float(contrast.partition("×")[0]) == pytest.approx(ratio, rel=0.05)
    assert shown["fall"].keys() == shown["rise"].keys()
    assert shown["fall"]["targets exact"] == shown["rise"]["targets exact"]


@pytest.mark.slow
def test_the_page_has_both_arms_with_and_without_projection(tmp_path):
    page = report_of(write_arms(tmp_path, ratios=(1.0, 0.25))).read_text()
    rows = trajectory_table(read_comparison(tmp_path).trajectories)
    assert [row[:2] for row in rows[1:4]] == [
        ["targets exact", "projected"],
        ["targets sampled", "projected"],
        ["targets sampled against targets exact", "projected"],
    ]
    assert len(rows) == 1 + 2 * 3
    for row in rows:
        assert all(text in page for text in row)
    assert "Sizes cannot be compared" not in page
    assert len(table_of(tmp_path)) == 1 + 4  # the projected checkpoints


@pytest.mark.slow
def test_one_seed_has_no_interval_and_traces_that_are_not_positive_no_ratio(tmp_path):
    one_seed = ratios_of(write_arms(tmp_path, ratios=(1.0, 0.25), seeds=1))
    assert all("one seed, no interval" in text for text in one_seed.values())
    negative = ratios_of(write_arms(tmp_path, ratios=(1.0, -0.25)))
    assert "–" not in negative["targets exact"]
    assert negative["targets sampled"] == "–"
    report_of(tmp_path)


@pytest.mark.slow
def test_arms_are_also_compared_at_their_ends_at_equal_loss(tmp_path):
    comparison = read_comparison(write_arms(tmp_path, ratios=(1.0, 0.25)))
    (pair,) = comparison.arm_comparison.pairs
    assert (pair.first.step, pair.second.step) == (12_000, 12_000)
    found = {one.claim: one.answer for one in judge(comparison)}
    for word in ("flatter", "more accurate"):
        claim = f"At equal excess loss targets sampled is {word} than targets exact"
        assert found[claim] == SUPPORTED
    assert [pair.first.step for pair in matched_pairs(comparison)] == [12_000]
    assert "targets sampled" in read_page(report_of(tmp_path)).visible


def test_an_arm_without_its_last_checkpoint_is_followed_nowhere(tmp_path):
    rows = read_results(write_arms(tmp_path, ratios=(1.0, 0.25)) / "results.csv")
    rows = [replace(row, last=row.step == 12_000) for row in rows]
    assert len(compare(rows).trajectories) == 2
    cut = [row for row in rows if not (row.last and row.point.startswith("exact"))]
    assert compare(cut).trajectories == []
    comparison = compare(cut)
    assert left_out_sentences(comparison) == [
        "Left out, because the last checkpoint was not measured: targets exact."
    ]
    test = label_noise_test(comparison)
    assert test.p is None
    assert test.reason == "no seed has a first and a last checkpoint in both arms"


def test_arms_of_several_sizes_are_no_trajectories(tmp_path):
    write_arms(tmp_path, ratios=(1.0, 0.25), num_params=(5000, 20_000))
    assert read_comparison(tmp_path).trajectories == []


def test_without_a_projection_a_change_under_label_noise_may_be_noise(tmp_path):
    rows = read_results(write_arms(tmp_path, ratios=(1.0, 0.25)) / "results.csv")
    assert label_noise_test(compare(rows))
    assert label_noise_test(compare([row for row in rows if not row.projected])) is None
