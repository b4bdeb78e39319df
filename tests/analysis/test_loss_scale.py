"""Losses on two scales: excess losses compare by ratio, held-out losses by paired difference."""

import re
from itertools import product

import numpy as np
import pytest
from scipy import stats

from jaxflat.analysis.cells import Cell, group_cells
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare, matched_pairs, read_comparison
from jaxflat.analysis.equal_loss import at_equal_loss
from jaxflat.analysis.loss_scale import EXCESS_LOSS, HELD_OUT_LOSS, loss_scale
from jaxflat.analysis.page import joint
from jaxflat.analysis.pairs import compare_pair, document_error
from jaxflat.analysis.results_csv import Row
from jaxflat.analysis.statistics.intervals import tost, tost_paired, tost_two_sources
from jaxflat.analysis.trajectories import change
from jaxflat.analysis.verdicts import NONE, SUPPORTED
from tests.analysis.conftest import write_rows
from tests.support.reports import lines_of, report_of, table_of

PARTS, SEEDS, STEPS = 16, 5, (100, 200, 400)
TRACE = "hessian_trace@embedded_invariant"
LARGER = "At equal held-out loss the larger model is the"


def text_records(document_scatter=0.005, shift=0.0, points=2.0) -> list[dict[str, object]]:
    """Rows of results.csv: two widths on a text. At equal loss the larger has `points` more.

    Losses fall with the step, from 4 nats; those of the larger width are lower by `shift`. Parts
    of the documents differ by 0.3 nats, alike for both models up to `document_scatter`.
    """
    random = np.random.default_rng(0)
    common_P = random.normal(0, 0.3, PARTS)
    own_2xP = random.normal(0, document_scatter, (2, PARTS))
    records = []
    for size, width in enumerate((16, 32)):
        for seed in range(SEEDS):
            offset = random.normal(0, 0.02)
            for place, step in enumerate(STEPS):
                loss = 4 - 0.2 * place + offset - shift * size
                parts_P = common_P + own_2xP[size]
                parts_P += loss - parts_P.mean()
                accuracy = 0.8 + 0.01 * points * size - 0.1 * (loss - 4) + random.normal(0, 0.001)
                records.append(
                    {"point": f"{width},{seed}", "model.width": width, "seed": seed, "step": step}
                    | {"num_params": 100 * width, "loss": loss, "loss_sem": 0.07}
                    | {f"loss/documents_{k:02}": x for k, x in enumerate(parts_P, start=1)}
                    | {TRACE: 50 * np.exp(-0.3 * size + random.normal(0, 0.02))}
                    | {"linear_probe/a.given/200": accuracy}
                )
    return records


def text_sweep(folder, **effects):
    folder.mkdir(exist_ok=True)
    write_rows(folder / "results.csv", text_records(**effects))
    return folder


def cells_of(folder) -> list[list[Cell]]:
    return list(read_comparison(folder).arms.values())


def test_the_scale_is_that_of_the_columns():
    def rows(*columns):
        return [Row("p", {}, "0", 1, False, dict.fromkeys(columns, 1.0))]

    assert loss_scale(rows("loss", "optimal_loss", "excess_loss")) is EXCESS_LOSS
    assert loss_scale(rows("loss", "optimal_loss")) is EXCESS_LOSS  # its excess was not finite
    assert loss_scale(rows("loss")) is HELD_OUT_LOSS
    assert loss_scale([]) is EXCESS_LOSS


def test_excess_losses_are_equal_by_the_logarithm_of_their_ratio():
    """The same bits as two one-sided tests of the logarithms."""
    random = np.random.default_rng(1)
    first = np.exp(random.normal(-5, 0.3, 6)).tolist()
    second = (np.array(first) * np.exp(random.normal(0, 0.05, 6))).tolist()
    for margin, power in zip(EXCESS_LOSS.margins(1.1), (0.5, 1, 2), strict=True):
        assert margin == 1.1**power
        found = EXCESS_LOSS.equal_losses(first, second, margin)
        expected = tost_paired(np.log(first).tolist(), np.log(second).tolist(), np.log(margin))
        assert (found.margin, found.p) == (margin, expected.p)
    assert EXCESS_LOSS.equal_losses([0.0, 1.0], [1.0, 1.0], 1.1).p is None


def test_held_out_losses_are_equal_by_their_difference():
    first, second = [4.0, 4.1, 3.9, 4.2], [4.003, 4.105, 3.902, 4.201]
    assert HELD_OUT_LOSS.margins(0.01) == (0.005, 0.01, 0.02)
    found = HELD_OUT_LOSS.equal_losses(first, second, 0.01)
    assert found.p == tost(np.subtract(second, first).tolist(), 0.01).p
    assert found.holds
    documents = HELD_OUT_LOSS.equal_losses(first, second, 0.01, (0.01, 16))
    assert not documents.holds  # other documents may differ by more


def test_two_sources_of_error_add_up_and_have_satterthwaites_degrees_of_freedom():
    values, error, count, margin = [0.001, 0.004, -0.002, 0.003], 0.002, 16, 0.01
    own = np.std(values, ddof=1) / 2
    variance = own**2 + error**2
    freedom = variance**2 / (own**4 / 3 + error**4 / 15)
    t = (margin - np.mean(values)) / np.sqrt(variance)  # the mean is above 0
    found = tost_two_sources(values, error, count, margin)
    assert found.p == pytest.approx(stats.t.sf(t, freedom), rel=1e-12)
    assert tost_two_sources(values, 0.0, count, margin) == tost(values, margin)
    only_documents = tost_two_sources([0.0] * 4, error, count, margin)
    assert only_documents.p == pytest.approx(stats.t.sf(margin / error, 15), rel=1e-12)
    assert tost_two_sources([0.0], error, count, margin).p is None


def test_unequal_losses_are_rarely_called_equal():
    """At a true difference of the margin, with seeds and documents drawn anew, at most 5%."""
    random, wrong = np.random.default_rng(2), 0
    for _ in range(2000):
        documents_P = random.normal(0, 0.02, PARTS)
        seeds = 0.01 + random.normal(0, 0.004, SEEDS) + documents_P.mean()
        error = documents_P.std(ddof=1) / np.sqrt(PARTS)
        wrong += tost_two_sources(seeds.tolist(), error, PARTS, 0.01).holds
    assert 0.02 < wrong / 2000 < 0.06


def test_the_error_over_documents_is_of_the_mean_difference_over_seeds(tmp_path):
    smaller, larger = cells_of(text_sweep(tmp_path, document_scatter=0.01))
    first, second = smaller[0], larger[0]
    names = [f"loss/documents_{k:02}" for k in range(1, PARTS + 1)]
    differences_SxP = np.array(
        [[second.rows[s].values[n] - first.rows[s].values[n] for n in names] for s in first.rows]
    )
    error, count = document_error(first, second)
    expected = differences_SxP.mean(0).std(ddof=1) / np.sqrt(PARTS)
    assert (error, count) == (pytest.approx(expected, rel=1e-9), PARTS)
    assert error < first.mean("loss_sem") / 10  # paired: what all models find hard cancels


def test_runs_are_read_at_equal_held_out_losses_evenly_spaced_in_nats(tmp_path):
    smaller, larger = at_equal_loss(cells_of(text_sweep(tmp_path, shift=0.1)))
    for seed, row in smaller.rows.items():
        assert row.values["loss"] == pytest.approx(larger.rows[seed].values["loss"], abs=1e-12)
        own = [cell.rows[seed].values["loss"] for cell in cells_of(tmp_path)[0]]
        other = [cell.rows[seed].values["loss"] for cell in cells_of(tmp_path)[1]]
        middle = (max(min(own), min(other)) + min(max(own), max(other))) / 2
        assert row.values["loss"] == pytest.approx(middle, abs=1e-12)
        # Accuracy is linear in the loss, so nothing but its noise distorts the difference.
        accuracies = [
            cell.rows[seed].values["linear_probe/a.given/200"] for cell in (larger, smaller)
        ]
        assert np.subtract(*accuracies) == pytest.approx(0.02, abs=0.004)


def test_a_verdict_on_a_text_needs_documents_that_show_equal_losses(tmp_path):
    clear = {one.claim: one for one in judge(read_comparison(text_sweep(tmp_path / "clear")))}
    assert clear[f"{LARGER} more accurate"].answer == SUPPORTED
    assert clear[f"{LARGER} flatter"].answer == SUPPORTED
    noisy = text_sweep(tmp_path / "noisy", document_scatter=0.1)
    found = {one.claim: one for one in judge(read_comparison(noisy))}
    assert found[f"{LARGER} more accurate"].answer == NONE
    assert found[f"{LARGER} flatter"].reason == (
        "no pair's losses are shown to be equal within 0.01 nats"
    )
    assert not matched_pairs(read_comparison(noisy))


def test_changes_on_a_text_compare_seeds_and_documents_of_the_same_runs():
    """The second arm's first checkpoint lacks seed 0, whose parts differ wildly at the ends."""
    random = np.random.default_rng(3)
    parts_4xSxP = 4 + random.normal(0, 0.01, (4, SEEDS, PARTS))
    parts_4xSxP[3, 0] += np.linspace(-1, 1, PARTS)
    cells = [
        Cell(
            arm,
            step,
            {
                str(s): Row(
                    f"{arm},{s}",
                    {"x": arm},
                    str(s),
                    step,
                    False,
                    {"loss": parts_P.mean()}
                    | {f"loss/documents_{k:02}": x for k, x in enumerate(parts_P, start=1)},
                )
                for s, parts_P in enumerate(parts_SxP)
                if (arm, step, s) != ("b", 1, 0)
            },
        )
        for (arm, step), parts_SxP in zip(product("ab", (1, 2)), parts_4xSxP, strict=True)
    ]
    found = change("", 0.1, *cells).equal
    differences_SxP = (parts_4xSxP[3] - parts_4xSxP[1])[1:]
    error = differences_SxP.mean(0).std(ddof=1) / np.sqrt(PARTS)
    expected = tost_two_sources(differences_SxP.mean(1).tolist(), error, PARTS, 0.1)
    assert found.p == pytest.approx(expected.p, rel=1e-6)
    assert found.holds


def test_without_an_overlap_checkpoints_are_compared_by_their_difference(tmp_path):
    smaller, larger = cells_of(text_sweep(tmp_path, shift=0.004))
    pair = compare_pair(smaller[-1], larger[-1], [], 0.1)
    assert pair.excess.mean == pytest.approx(
        larger[-1].mean("loss") - smaller[-1].mean("loss"), abs=1e-12
    )
    assert pair.excess_ratio is None
    assert [test.margin for test in pair.equivalences] == [0.05, 0.1, 0.2]
    assert pair.equivalence.holds


@pytest.mark.slow
def test_the_page_of_a_text_names_its_losses_and_what_is_not_known(tmp_path):
    folder = text_sweep(tmp_path)
    page = report_of(folder).read_text()
    shown = re.sub(r"<script.*?</script>|src=\"data:[^\"]*\"", "", page, flags=re.S)
    body = shown[shown.index("<body") : shown.index("<details><summary>How to read")]
    assert "xcess loss" not in body
    assert "&lt;p class" not in body  # the notes are HTML
    assert "Verdicts, at equal held-out loss" in body
    assert "Held-out loss (nats)" in body
    assert "The distance from the optimum is not known" in body
    assert "Its SEM over documents, paired" in body
    assert "Spearman given" not in body or "Spearman given held-out loss" in body
    assert "Held-out loss\n(nats)" in table_of(folder)[0]
    assert any(line.startswith(f"{LARGER} more accurate") for line in lines_of(folder))


@pytest.mark.slow
def test_a_text_stands_beside_a_sweep_with_a_known_optimum(tmp_path, sweep):
    folders = {"text": text_sweep(tmp_path / "text"), "known": sweep(accuracy=1.5)}
    sweeps = joint.read_sweeps(folders)
    judged = joint.judge_sweeps(sweeps)
    assert "pairs of models at equal loss;" in joint.summary_sentence(sweeps, judged)
    claims = {row[0] for row in joint.verdicts_table(judged)}
    assert {
        f"{LARGER} more accurate",
        "At equal excess loss the larger model is the more accurate",
    } <= claims
    page = joint.write_joint(sweeps, judged, folders, tmp_path / "page").read_text()
    assert "Verdicts, at equal held-out loss" in page
    assert "Verdicts, at equal excess loss" in page
    assert "pair of models of equal loss." in page


def test_arms_of_rows_without_parts_are_compared_by_seeds_alone(tmp_path):
    """Rows of another tool may have losses only."""
    rows = [
        Row(f"{arm},{seed}", {"x": arm}, seed, step, False, {"num_params": 10.0, "loss": loss})
        for arm in "ab"
        for seed, loss in (("0", 3.0), ("1", 3.1))
        for step, loss in ((1, loss), (2, loss - 0.5))
    ]
    comparison = compare(rows)
    assert comparison.scale is HELD_OUT_LOSS
    first, second = group_cells(rows).values()
    assert compare_pair(first[0], second[0], [], 0.01).document_error is None
