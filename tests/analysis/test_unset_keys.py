"""Arms of a sweep that set different keys: an empty cell of results.csv means "not set"."""

from itertools import product

import numpy as np
import pytest

from jaxflat.analysis.associations import GIVEN_ALL, associations, statistics
from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.loss_scale import EXCESS_LOSS
from jaxflat.analysis.page import document, figures, findings, joint, tables, view
from jaxflat.analysis.page.evidence import correlations_table, verdicts_table
from jaxflat.analysis.results_csv import read_number, read_results
from tests.analysis.conftest import write_rows
from tests.support.counts import in_full
from tests.support.pages import read_page

RATE = "phases.pretrain.schedule.learning_rate"
BATCH = "phases.pretrain.batch_size"
RHO = "phases.pretrain.optimizer.rho"
TARGETS = "phases.pretrain.targets"
ORDER = "phase_order"
NAME = "model.name"
WIDTH = "model.width"
TRACE, PROBE = "hessian_trace@embedded", "linear_probe/state_3.map/4000"
RATES = [{RATE: 1e-3}, {RATE: 3e-3}]
SAM = [{RHO: 0.05}, {RHO: 0.1}]
TABLE = {NAME: "lookup_table", "model.features": "p", ORDER: "()"}


def write_arms(folder, arms, seeds=3, steps=(1000, 2000), skip=()):
    """Write results.csv of points `arms` over seeds; `skip`: (arm, seed or None, column or None).

    With a column, the arm's cells in it are empty; without one, the arm's rows are missing.
    """
    random = np.random.default_rng(0)
    swept = list(dict.fromkeys(key for arm in arms for key in arm))
    rows = []
    for seed, (place, arm) in product(range(seeds), enumerate(arms)):
        table = arm.get(NAME) == "lookup_table"
        for step in (0,) if table or arm.get(ORDER) == "()" else steps:
            loss = 0.0 if table else 0.004 * (step / 1000 or 0.01) ** -0.7
            row = {
                **{"point": f"{place},{seed}", **{key: arm.get(key, "") for key in swept}},
                **{"seed": seed, "step": step, "projected": 0, "last": int(step == steps[-1])},
                "num_params": "" if table else arm.get(WIDTH, 16) ** 2,
                "excess_loss": loss and loss + random.normal(0, 1e-4),
                "excess_loss_sem": 1e-4,
                TRACE: "" if table else 40 * np.exp(random.normal(0.1 * place, 0.05)),
                PROBE: 0.9 + random.normal(0, 0.01),
                f"{PROBE}_sem": 0.01,
            }
            for skipped, of_seed, column in skip:
                if skipped == place and of_seed in (None, seed):
                    row = row | {column: ""} if column else {}
            rows += [row] if row else []
    write_rows(folder / "results.csv", rows)
    return folder


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "rendered"])
def rendered(request, monkeypatch):
    """Every test draws the figures; only the slow ones render them, and draw them twice.

    The joint page of one sweep shows the same view of it as the sweep's own page.
    """
    if not request.param:
        views = []

        def view_once(*arguments):
            views.append(view.view_sweep(*arguments))
            return views[-1]

        monkeypatch.setattr(figures, "render", lambda *_, **__: b"")
        monkeypatch.setattr(document, "view_sweep", view_once)
        monkeypatch.setattr(joint, "view_sweep", lambda *_: views[-1])


def everything(folder):
    """Return the text of each table, finding and page."""
    comparison = read_comparison(folder)
    sweeps = {"a": comparison}
    judged = joint.judge_sweeps(sweeps)
    report = document.write_report(folder, comparison, judged["a"])
    pages = [report, joint.write_joint(sweeps, judged, {"a": folder}, folder / "all")]
    texts = findings.console_lines(comparison, judged["a"].verdicts)
    texts += [text for row in verdicts_table(judged["a"].verdicts) for text in row]
    texts += [text for row in tables.summary_table(comparison) for text in row]
    texts += [
        text for row in correlations_table(judged["a"].correlations, EXCESS_LOSS) for text in row
    ]
    texts += [read_page(path).visible for path in pages]
    return texts


ARMS = {
    "a-rate-or-sam": [*RATES, *SAM],
    "sam-or-a-rate": [*SAM, *RATES],
    "a-rate-or-nothing": [*RATES, {}],
    "nothing-first": [{}, {BATCH: 16}, {RATE: 3e-3, BATCH: 16}],
    "a-lookup-table": [*RATES, *SAM, TABLE],
    "a-lookup-table-of-one-kind": [*RATES, {**TABLE, "model.features": ""}],
    "untrained": [*RATES, {NAME: "transformer", ORDER: "()"}, TABLE],
    "numbers-and-text": [{RATE: value} for value in (1e-3, "auto", 3)],
    "tuples-and-truth": [{RHO: value} for value in (True, "(1, 2)", 0.1)],
    "sizes": [{WIDTH: 32, RATE: 1e-3}, {WIDTH: 64}, {}],
    "a-name-or-none": [{WIDTH: 32}, {WIDTH: 64, NAME: "transformer"}, TABLE],
    "targets": [{TARGETS: "sampled"}, {TARGETS: "exact"}, *RATES],
    "one-targets": [{TARGETS: "sampled"}, {TARGETS: "exact", RATE: 1e-3}, {}],
    "one-arm": RATES[:1],
    "a-lookup-table-alone": [TABLE],
}
OTHERS = [pytest.param(1, name, marks=pytest.mark.slow) for name in [*ARMS][2:]]
SLOW_ALONE = [*OTHERS[::4], *in_full(*(other for i, other in enumerate(OTHERS) if i % 4))]


@pytest.mark.parametrize(
    ("seeds", "name"),
    [*((3, name) for name in ARMS), *((1, name) for name in [*ARMS][:2]), *SLOW_ALONE],
)
def test_every_table_figure_and_finding_is_made(tmp_path, rendered, seeds, name):
    texts = everything(write_arms(tmp_path, ARMS[name], seeds))
    assert not [text for text in texts if "nan" in text]


@pytest.mark.parametrize(
    "skip",
    [
        pytest.param([(2, None, TRACE)], id="an-arm-without-a-measure"),
        pytest.param([(0, None, TRACE), (1, None, TRACE)], id="the-first-arms-without-it"),
        pytest.param([(2, None, PROBE), (3, None, PROBE)], id="arms-without-accuracy"),
        pytest.param([(2, 0, TRACE), (2, 1, PROBE)], id="a-cell-in-one-seed"),
        pytest.param([(2, 0, "excess_loss")], id="one-loss"),
        pytest.param([(2, None, "excess_loss")], id="an-arm-without-loss"),
        pytest.param([(0, None, "num_params")], id="an-arm-without-a-size"),
        pytest.param([(3, 0, None), (3, 1, None)], id="an-arm-of-one-seed"),
        pytest.param([(0, 0, None), (1, 1, None), (2, 2, None)], id="each-lacks-a-seed"),
        pytest.param([(0, 0, None), (0, 1, None), (1, 2, None)], id="arms-share-no-seed"),
        pytest.param([(place, None, TRACE) for place in range(4)], id="no-measure"),
    ],
)
def test_whatever_an_arm_lacks_leaves_a_page(tmp_path, rendered, skip):
    texts = everything(write_arms(tmp_path, [*RATES, *SAM], skip=skip))
    assert not [text for text in texts if "nan" in text]


def test_an_unset_key_is_no_part_of_a_name(tmp_path):
    comparison = read_comparison(write_arms(tmp_path, [*RATES, *SAM, {}, TABLE]))
    rates, rhos = ["learning_rate 0.001", "learning_rate 0.003"], ["rho 0.05", "rho 0.1"]
    assert list(comparison.arms) == [*rates, *rhos, "trained model"]
    assert [cell.arm for cell in comparison.controls] == ["lookup table p"]
    assert {row.swept[RHO] for row in read_results(tmp_path / "results.csv")} == {"", "0.05", "0.1"}


def test_an_arm_is_named_by_what_it_alone_sets(tmp_path):
    """The rate distinguishes both arms, but the second does not set it."""
    comparison = read_comparison(write_arms(tmp_path, [*RATES, *SAM[:1]]))
    assert list(comparison.arms) == ["learning_rate 0.001", "learning_rate 0.003", "rho 0.05"]


def test_an_arm_that_alone_sets_a_language_is_no_way_of_training(tmp_path):
    arms = [*RATES, {"language.name": "dyck"}]
    assert read_comparison(write_arms(tmp_path, RATES)).arm_comparison
    assert read_comparison(write_arms(tmp_path, arms)).arm_comparison is None


def test_keys_of_one_last_part_name_two_settings(tmp_path):
    """Without the phase, both would be called "learning_rate 0.001", and one would be lost."""
    arms = [{f"phases.{phase}.schedule.learning_rate": 1e-3} for phase in ("warm", "cool")]
    comparison = read_comparison(write_arms(tmp_path, [*arms, *SAM[:1]]))
    names = [f"{phase}.schedule.learning_rate 0.001" for phase in ("warm", "cool")]
    assert list(comparison.arms) == [*names, "rho 0.05"]


def test_a_rate_that_some_arms_do_not_set_is_not_taken_out(tmp_path):
    steps = (1000, 2000, 4000)
    loss_and_step = associations(read_comparison(write_arms(tmp_path, SAM, steps=steps)))[0]
    assert GIVEN_ALL in loss_and_step.found
    one = associations(read_comparison(write_arms(tmp_path, [*RATES, *SAM])))[0]
    assert one.missing == {GIVEN_ALL: f"some arms do not set {RATE} to a number"}
    assert {*one.found, GIVEN_ALL} == {*statistics(EXCESS_LOSS)}


@pytest.mark.parametrize(
    ("text", "number"), [("", None), ("auto", None), ("(1, 2)", None), ("3e-3", 0.003)]
)
def test_a_cell_is_a_number_or_none(text, number):
    assert read_number(text) == number


def test_text_in_a_measured_column_is_named_with_its_place(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("point,x,seed,step,loss\na,auto,0,1,2.5\nb,,0,1,2.5 nats\n")
    with pytest.raises(ValueError, match=r"results\.csv, line 3: column 'loss' needs a number"):
        read_results(path)
