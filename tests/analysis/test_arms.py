"""Arms of one size: an effect, none and its reverse; unequal losses get no verdict."""

import csv
import html
import re
from dataclasses import astuple

import numpy as np
import pytest

from jaxflat.analysis import claims
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.page import drawing, joint
from jaxflat.analysis.page.overview import overview
from jaxflat.analysis.verdicts import CONTRADICTED, NONE, NOT_IDENTIFIED, SUPPORTED, UNDECIDED
from jaxflat.report import main
from tests.analysis.conftest import write_rows
from tests.support.claims import ACROSS
from tests.support.reports import lines_of, report_of, table_of

ORDERS = {
    "sgd": "('warm', 'sgd')",
    "adamw": "('warm', 'adamw')",
    "adversary → off": "['warm', 'adversary', 'off']",
}


def write_arms_results(
    folder, accuracy=0.0, log_trace=0.0, excess=0.0, seeds=5, trace=40.0, unfinished=0
):
    """Write three arms: `accuracy` and `log_trace` change the second, `excess` the third.

    `excess` is in nats. In the first `unfinished` seeds the third has only an earlier checkpoint.
    """
    random = np.random.default_rng(1)
    rows = []
    for seed in range(seeds):
        for place, order in enumerate(ORDERS.values()):
            second, third = place == 1, place == 2
            last = not (third and seed < unfinished)
            rows.append(
                {
                    **{"point": f"{place},{seed}", "model.name": "transformer"},
                    **{
                        "model.features": "",
                        "phase_order": order,
                        "seed": seed,
                        "step": 50 + 50 * last,
                    },
                    **{"projected": 0, "last": int(last), "num_params": 1000},
                    "excess_loss": 0.004 + excess * third + random.normal(0, 1e-4),
                    "hessian_trace@embedded": trace
                    * np.exp(log_trace * second + random.normal(0, 0.03)),
                    "linear_probe/a.map/100": 0.9 + accuracy * second + random.normal(0, 0.005),
                }
            )
        table = {"model.name": "lookup_table", "model.features": "p", "phase_order": "()"}
        rows.append(
            {"point": f"p,{seed}", **table, "seed": seed, "step": 0, "projected": 0}
            | {"excess_loss": 0.0, "linear_probe/a.map/100": 0.85}
        )
        rows.append(
            {"point": f"u,{seed}", "model.name": "transformer", "phase_order": "()", "step": 0}
            | {"seed": seed, "num_params": 1000, "excess_loss": 2.0, "linear_probe/a.map/100": 0.5}
        )
    write_rows(folder / "results.csv", rows)
    return folder


def answers(folder):
    return {one.claim: one.answer for one in judge(read_comparison(folder))}


@pytest.mark.parametrize(
    ("effect", "accurate", "flatter"),
    [
        ({"accuracy": 0.05, "log_trace": -0.5}, SUPPORTED, SUPPORTED),
        ({"accuracy": -0.05, "log_trace": -0.5}, CONTRADICTED, SUPPORTED),
        ({"accuracy": 0.05, "log_trace": 0.5}, SUPPORTED, CONTRADICTED),
        ({}, UNDECIDED, UNDECIDED),
    ],
)
def test_an_arm_is_judged_against_the_first_of_the_sweep(tmp_path, effect, accurate, flatter):
    found = answers(write_arms_results(tmp_path, **effect))
    assert found["At equal excess loss adamw is more accurate than sgd"] == accurate
    assert found["At equal excess loss adamw is flatter than sgd"] == flatter


@pytest.mark.parametrize("accuracy", [0.05, -0.05])
def test_few_arms_do_not_identify_an_effect_of_flatness(tmp_path, accuracy):
    """The flatter arm is the more accurate, or the less, but it differs in its optimizer too."""
    effects = {"accuracy": accuracy, "log_trace": -0.5}
    verdicts = judge(read_comparison(write_arms_results(tmp_path, **effects)))
    (found,) = [one for one in verdicts if one.claim == ACROSS]
    assert (found.answer, found.p) == (NOT_IDENTIFIED, None)
    assert found.reason == "flatness differs only with phase_order"


def test_an_unequal_loss_is_shown_and_kept_out_of_the_verdicts(tmp_path):
    folder = write_arms_results(tmp_path, accuracy=0.05, log_trace=-0.5, excess=0.01)
    found = answers(folder)
    assert found["At equal excess loss adversary → off is more accurate than sgd"] == NONE
    assert found["At equal excess loss adamw is more accurate than sgd"] == SUPPORTED
    pairs = joint.matched_pairs(read_comparison(folder))
    assert [pair.second.arm for pair in pairs] == ["adamw"]
    page = report_of(folder).read_text()
    assert "not shown, p" in page
    assert "0.0140" in page


def test_names_leave_out_the_shared_start_and_keep_the_order_of_the_sweep(tmp_path):
    comparison = read_comparison(write_arms_results(tmp_path))
    assert list(comparison.arms) == list(ORDERS)
    assert [cell.arm for cell in comparison.controls] == ["untrained", "lookup table p"]


def test_each_arm_is_set_against_the_first_beside_the_untrained_control(tmp_path):
    folder = write_arms_results(tmp_path, accuracy=0.05, log_trace=-0.5)
    comparison = read_comparison(folder)
    against = comparison.arm_comparison.against
    assert [(pair.first.arm, pair.equivalence.holds) for pair in against] == [("sgd", True)] * 2
    table = overview(comparison)
    assert table.baseline == "sgd"
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    adamw, control = (
        next(row for row in rows if row["Arm"] == arm) for arm in ("adamw", "untrained")
    )
    assert adamw["Accuracy difference (points)"].startswith("+")
    assert control["Accuracy (%)"][0].isdigit()
    text = " ".join(lines_of(folder))
    assert "accuracy, adamw minus the other, points: +" in text
    assert "nan" not in text


def test_one_seed_is_no_verdict(tmp_path):
    folder = write_arms_results(tmp_path, accuracy=0.05, seeds=1)
    assert {*answers(folder).values()} == {NONE, NOT_IDENTIFIED}
    assert "because one seed gives no interval: " in " ".join(lines_of(folder))


@pytest.mark.parametrize(("trace", "shown"), [(40.0, "39.8 ± 1.3"), (0.04, "0.0398 ± 0.0013")])
def test_sharpness_is_shown_to_the_digits_that_its_interval_asks_for(tmp_path, trace, shown):
    comparison = read_comparison(write_arms_results(tmp_path, trace=trace))
    assert overview(comparison).rows[0][3] == shown


def test_a_way_is_compared_at_its_last_checkpoint_or_named_as_missing(tmp_path):
    third = "adversary → off"
    some = read_comparison(write_arms_results(tmp_path, unfinished=2))
    pair = next(pair for pair in some.arm_comparison.against if pair.second.arm == third)
    assert (pair.second.step, pair.excess.count, some.missing) == (100, 3, [])
    folder = write_arms_results(tmp_path, unfinished=5)
    assert read_comparison(folder).missing == [third]
    assert not [claim for claim in answers(folder) if third in claim]
    left_out = f"Left out, because the last checkpoint was not measured: {third}."
    assert lines_of(folder)[-1] == left_out


@pytest.mark.slow
def test_one_page_over_several_sweeps(tmp_path, sweep, capsys, monkeypatch):
    judged, name = [], "a_sweep_with_a_long_name-laptop"
    monkeypatch.setattr(claims, "label_noise_test", judged.append)
    (tmp_path / name).mkdir()
    folders = [
        write_arms_results(tmp_path / name, accuracy=0.05, log_trace=-0.5),
        sweep(accuracy=1.5, log_trace=0.3),
    ]
    output, file = tmp_path / "page", tmp_path / "new" / "v.json"
    assert main([*map(str, folders), f"--output={output}", f"--json={file}"]) == 0
    assert len(judged) == 2  # each sweep once
    printed = " ".join(capsys.readouterr().out.split())
    assert "…" not in printed
    assert "6 pairs of models at equal excess loss; primary claims: none declared" in printed
    page = (output / "report.html").read_text()
    for text in (
        "Over 2 sweeps",
        "Verdicts of all sweeps",
        "adamw is more accurate than sgd",
        "6 pairs of models",
    ):
        assert text in page
    assert (output / "figures" / "interventions.png").stat().st_size > 0
    assert '"answer": "supported"' in file.read_text()


def test_a_folder_without_results_is_unusable(tmp_path, capsys):
    assert main([str(tmp_path), f"--output={tmp_path / 'page'}"]) == 2
    error = capsys.readouterr().err
    assert "has no results.csv" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_the_first_way_of_training_stays_the_first_where_a_point_of_it_failed(tmp_path):
    path = write_arms_results(tmp_path) / "results.csv"
    header, first, *others = path.read_text().splitlines()
    assert "sgd" in first
    path.write_text("\n".join([header, *others]) + "\n")
    found = read_comparison(tmp_path).arm_comparison
    assert found is not None
    assert found.baseline.arm == "sgd"
    assert {pair.excess.count for pair in found.against} == {4}


def test_other_settings_than_of_training_are_no_ways_of_training(tmp_path):
    path = write_arms_results(tmp_path) / "results.csv"
    path.write_text(path.read_text().replace("phase_order", "language.seed", 1))
    assert read_comparison(tmp_path).arm_comparison is None


NAMES = {"sgd": "SGD", "adamw": "Adam [with] decay", "adversary → off": "<off> & on"}


def write_named(folder, names, **effects):
    """Write the same three arms, with the names that a sweep gives them; "" gives none."""
    path = write_arms_results(folder, **effects) / "results.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    arms = dict(zip(ORDERS.values(), names, strict=True))
    rows = [{"point": row["point"], "arm": arms.get(row["phase_order"], ""), **row} for row in rows]
    write_rows(path, rows)
    return folder


def test_names_stand_in_verdicts_tables_figures_and_findings(tmp_path, monkeypatch):
    """They change no number: the texts without names differ in the names only."""
    legends = []
    monkeypatch.setattr(drawing, "legend", lambda ax: legends.extend(labels_of(ax)))
    effects = {"accuracy": 0.05, "log_trace": -0.5}
    (tmp_path / "plain").mkdir()
    plain = write_arms_results(tmp_path / "plain", **effects)
    named = write_named(tmp_path, NAMES.values(), **effects)
    page = report_of(named).read_text()
    assert {*NAMES.values()} <= {*legends}
    assert html.escape("<off> & on") in page
    assert "<off> & on" not in page

    def texts(folder):
        comparison = read_comparison(folder)
        found = [" ".join(map(str, astuple(one))) for one in judge(comparison)]
        found += [" ".join(row) for row in overview(comparison).rows]
        found += [" ".join(row) for row in table_of(folder)]
        return [*found, *lines_of(folder)]

    def with_names(text):
        for words, name in NAMES.items():
            text = re.sub(rf"(?<!\w){words}(?!\w| →)", name, text, flags=re.IGNORECASE)
        return text.replace("only with phase_order", "only with the arm")

    assert [with_names(text) for text in texts(plain)] == texts(named)


def test_an_arm_without_a_name_is_called_by_its_keys(tmp_path):
    comparison = read_comparison(write_named(tmp_path, ("SGD", "", "")))
    assert list(comparison.arms) == ["SGD", "adamw", "adversary → off"]
    assert comparison.arm_comparison.baseline.arm == "SGD"


def labels_of(ax):
    return ax.get_legend_handles_labels()[1]
