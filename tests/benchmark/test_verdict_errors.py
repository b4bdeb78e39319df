"""The table of false verdicts: which verdicts are false, and the command's rows and figures."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from jaxflat.analysis.synthetic import draw_sweep
from jaxflat.analysis.verdicts import EFFECT
from jaxflat.benchmark import verdict_table
from jaxflat.benchmark.__main__ import main
from jaxflat.benchmark.verdict_errors import (
    VerdictCounts,
    count_all,
    count_verdicts,
    is_false,
    named_arms,
    planted_value,
    right_answer,
)
from jaxflat.benchmark.verdict_scenarios import scenarios
from tests.support.counts import in_full

BY_NAME = {scenario.name: scenario for scenario in scenarios()}
MOST_FALSE, MOST_FALSE_SWEEPS, LEAST_POWER = 7.0, 10.0, 90.0  # %


@pytest.mark.parametrize(
    ("answer", "false_of"),
    [
        ("supported", [-1.0, -0.5, -0.1, 0.0]),
        ("contradicted", [0.0, 0.1, 0.5, 1.0]),
        ("negligible", [-1.0, -0.5, 0.5, 1.0]),
        ("undecided", []),
        ("not identified", []),
        ("no verdict", []),
    ],
)
def test_which_planted_values_make_an_answer_false(answer, false_of):
    values = (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
    assert [value for value in values if is_false(answer, value)] == false_of
    assert not any(is_false(right_answer(value), value) for value in values)


def test_a_claim_names_its_arms():
    arms = BY_NAME["doses, slope 0"].arms
    assert named_arms("strength 0.0001 is flatter than strength 0.0", arms) == [2, 0]
    assert named_arms("than strength 1e-05, within 0.5 points", arms) == [1]
    assert named_arms("the larger model is the flatter", arms) == []


def test_planted_values_are_those_of_the_arms_that_are_compared():
    worse = BY_NAME["one of 5 settings is less accurate"]
    sweep = draw_sweep(worse.arms, worse.truth, np.random.default_rng(0))
    first, last = (f"learning_rate {r}, batch_size {b}" for r, b in (("0.001", 16), ("0.003", 16)))
    claim = f"At equal excess loss {last} is more accurate than {first}"
    assert planted_value(claim, "accuracy", worse, sweep) == pytest.approx(-2.0)
    ratio = sweep.log_trace_A[4] - sweep.log_trace_A[0]
    assert planted_value(claim, "flatness", worse, sweep) == pytest.approx(-ratio / np.log(2))
    raised = BY_NAME["flatter is better, size raises both"]
    sweep = draw_sweep(raised.arms, raised.truth, np.random.default_rng(0))
    larger = "At matched excess loss the larger model is"
    assert planted_value(f"{larger} more accurate", "accuracy", raised, sweep) > 0
    assert planted_value(f"{larger} flatter", "flatness", raised, sweep) < 0
    assert planted_value("flatter is better", "effect", raised, sweep) == 1.0


def test_planted_slopes_are_those_of_the_penalty_that_a_claim_names():
    penalties = BY_NAME["two penalties, slopes 0 and 0.5; two controls"]
    sweep = draw_sweep(penalties.arms, penalties.truth, np.random.default_rng(0))
    of = {"gauss newton trace": 0.0, "hessian max eigenvalue": 0.5, "parameter norm": 0.0}
    for measure, slope in of.items():
        claim = f"At equal excess loss a trace that a penalty on {measure} lowers raises accuracy"
        assert planted_value(claim, "effect", penalties, sweep) == slope


def test_arms_have_texts_that_no_other_arm_has():
    for scenario in scenarios():
        for a, arm in enumerate(scenario.arms):
            keys = arm.swept.items()
            text = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in keys if value)
            assert named_arms(f"the arm {text} is flatter", scenario.arms) == [a]


def test_false_verdicts_are_counted_by_claim_and_by_sweep(monkeypatch):
    """Of two claims on an effect that does not exist, one is false in every sweep."""
    made = [("effect", "A", "supported"), ("effect", "B", "undecided"), ("accuracy", "C", "")]
    verdicts = [SimpleNamespace(kind=k, claim=c, answer=a, reason="") for k, c, a in made]
    monkeypatch.setattr("jaxflat.benchmark.verdict_errors.judge", lambda _: verdicts)
    counts = count_verdicts(BY_NAME["nothing differs: 3 widths"], 3, (0,))
    assert counts.wrong == {("effect", "A"): 3}
    assert counts.answers == dict.fromkeys(made, 3)
    assert counts.wrong_sweeps == {"effect": 3, "any": 3}
    assert counts.effect == {"supported": 3}
    twice = counts + counts
    assert (twice.num_sweeps, twice.worst("effect"), twice.worst("accuracy")) == (6, 6, 0)


def test_figures_are_percentages_with_exact_intervals():
    answers = Counter({("effect", "A", "supported"): 5, ("effect", "A", "undecided"): 95})
    wrong, sweeps = Counter({("effect", "A"): 5}), Counter({"effect": 5, "any": 5})
    effect = Counter({"supported": 5, "undecided": 90, "not identified": 5})
    counts = VerdictCounts(100, answers, wrong, sweeps, effect)
    figures = verdict_table.figures_of(BY_NAME["nothing differs: 3 widths"], counts)
    medians = {name: figure.median for name, figure in figures.items()}
    assert medians == {
        "effect, % false": 5,
        "any claim, % false": 5,
        "right on the effect, %": 0,
        "undecided, %": 90,
        "no verdict, %": 5,
    }
    np.testing.assert_allclose(figures["effect, % false"].min, 1.643, atol=1e-3)
    assert verdict_table.line("name", figures) == (
        "| name | – | – | 5.0 | – | 5.0 | 0.0 | 90.0 | 5.0 |"
    )


@pytest.mark.slow
def test_the_command_prints_a_row_and_writes_figures_for_each_scenario(tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = ["--sweeps=2", "--repeats=1", "--seconds=0.01", f"--json={path}"]
    assert main(["verdicts", *flags]) == 0
    output, figures = capsys.readouterr().out, json.loads(path.read_text())
    columns = verdict_table.header().split("\n")[0].count("|")
    for name in BY_NAME:
        (line,) = (line for line in output.splitlines() if line.startswith(f"| {name} |"))
        assert line.count("|") == columns
        found = figures[f"verdicts/{name}/any claim, % false"]
        assert found["unit"] == "% of 2 sweeps"
        assert found["median"] in (0, 50, 100)


@pytest.mark.parametrize("name", [name for name in BY_NAME if not name.startswith("two penal")])
def test_only_penalties_with_an_effect_of_their_own_have_another_slope(name):
    scenario = BY_NAME[name]
    sweep = draw_sweep(scenario.arms, scenario.truth, np.random.default_rng(0))
    for claim in ("the flatter are the more accurate", "gauss newton trace"):
        assert planted_value(claim, EFFECT, scenario, sweep) == scenario.truth.slope


@pytest.mark.slow
@pytest.mark.parametrize("num_sweeps", in_full(2000))
def test_verdicts_are_rarely_false(num_sweeps):
    """Any claim: by the lower end of the exact 95% interval, because the nominal rate is 9.75%."""
    found = dict(verdict_table.measure_verdicts(num_sweeps))
    for name, figures in found.items():
        false = {column: f for column, f in figures.items() if column.endswith("% false")}
        assert false.pop("any claim, % false").min <= MOST_FALSE_SWEEPS, name
        assert max(f.median for f in false.values()) <= MOST_FALSE, name
    assert found["doses, slope 1"]["right on the effect, %"].median >= LEAST_POWER


@pytest.mark.slow
def test_the_number_of_processes_changes_no_count():
    chosen = scenarios()[:1]
    (counts,) = count_all(chosen, 52)
    expected = [count_verdicts(chosen[0], size, (0, c)) for c, size in enumerate((50, 2))]
    assert counts == expected[0] + expected[1]
