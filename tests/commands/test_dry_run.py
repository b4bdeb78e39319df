"""The dry run's prediction: which claims a sweep could decide, for shipped and unusual sweeps."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from jaxflat import dry_run
from jaxflat.analysis import power
from jaxflat.analysis.claims import judge
from jaxflat.analysis.comparison import compare
from jaxflat.analysis.plan import UNDECLARED
from jaxflat.analysis.synthetic import PlantedTruth, draw_sweep
from jaxflat.config import Sweep, arm, chain, loading, param, product
from jaxflat.sweeps import points
from tests.support.sweeps import tiny_config, tiny_sweep

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


@pytest.fixture(autouse=True)
def two_results(monkeypatch):
    """Judge two made-up results, however slowly: their number changes percentages only."""
    monkeypatch.setattr(power, "NUM_SWEEPS", 2)
    monkeypatch.setattr(power, "MAX_SECONDS", math.inf)


def shown(expanded, capsys) -> str:
    dry_run.show_power(expanded)
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        *((name, "smoke") for name in SHIPPED),
        ("model_size_sweep.py", "laptop"),
        *(
            pytest.param(name, scale, marks=pytest.mark.slow)
            for name in SHIPPED
            for scale in ("laptop", "full", "paper")
        ),
    ],
)
def test_every_shipped_sweep_has_a_prediction(name, scale, tmp_path, capsys, monkeypatch):
    """Neither a teacher's files nor the memory of large models are needed."""
    monkeypatch.setattr("jaxflat.runs.builders.num_params", lambda config: config.model.width**2)
    monkeypatch.setattr("jaxflat.runs.checks.check_config", lambda config: None)
    config, listed = loading.load(f"{ROOT}/configs/{name}:{scale}")
    text = shown(points.expand(config, listed, tmp_path), capsys)
    assert text.startswith("What this sweep could decide, from 2 made-up results of its shape.")
    assert "Power: how often the report says 'supported' if the effect is real" in text


def tiny_points(sweep: Sweep, tmp_path):
    return points.expand(tiny_config(), sweep, tmp_path)


UNUSUAL = {
    "one point": [{}],
    "two languages": product(
        param("seed", [0, 1]), param("language.seed", [0, 1]), param("model.width", [8, 16])
    ),
    "crossed seeds": product(
        param("data_seed", [0, 1]), param("init_seed", [0, 1]), param("model.width", [8, 16])
    ),
    "one seed lacks an arm": [{"seed": 0}, {"seed": 0, "model.width": 16}, {"seed": 1}],
    "an untrained model": product(
        param("seed", [0, 1]), param("phase_order", [("pretrain", "drift"), ()])
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_sweeps_have_a_prediction(name, tmp_path, capsys):
    text = shown(tiny_points(UNUSUAL[name], tmp_path), capsys)
    assert text.startswith("What this sweep could decide, from 2 made-up results of its shape.")


@pytest.mark.parametrize("name", ["text", "hmm"])
def test_the_prediction_on_a_text_says_that_it_leaves_documents_out(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("jaxflat.runs.builders.num_params", lambda config: config.model.width**2)
    monkeypatch.setattr("jaxflat.runs.checks.check_config", lambda config: None)
    config = tiny_config()
    config.language.name, config.claims.primary = name, "flatness"
    text = shown(points.expand(config, WIDTHS, tmp_path), capsys)
    assert ("leaves out the error over held-out documents" in text) == (name == "text")


def test_lookup_tables_only_give_no_verdicts(tmp_path, capsys):
    tables = product(param("model.name", ["lookup_table"]), param("phase_order", [()]))
    text = shown(tiny_points(tables, tmp_path), capsys)
    assert text == "No point measures a trained model, so there will be no verdicts."


def test_arms_have_the_points_seeds_checkpoints_and_sizes(tmp_path):
    expanded = tiny_points(tiny_sweep(), tmp_path)
    small, large = dry_run.synthetic_arms(expanded)
    assert small.swept == {"model.width": "8", "model.name": "", "phase_order": ""}
    assert small.seeds == large.seeds == ["0", "1"]
    assert small.steps == [7, 14, 16, 16]
    assert small.projected == [False, False, False, True]
    assert small.excess_losses == pytest.approx([0.003 * 2**0.5, 0.003, 0.003, 0.003])
    assert 0 < small.num_params < large.num_params


def test_a_claim_that_no_result_decides_is_listed_with_its_reason(tmp_path, capsys):
    text = shown(tiny_points(product(param("seed", [0, 1])), tmp_path), capsys)
    assert "No verdict on 'At equal excess loss the larger model is the more accurate'" in text


@pytest.mark.parametrize("last", [12, 20])
def test_steps_after_the_last_checkpoint_are_named(last, tmp_path, capsys):
    config = tiny_config()
    config.phase_order, config.phases.pretrain.steps = ("pretrain",), 20
    config.phases.pretrain.checkpoint_steps = (5, last)
    del config.phases.drift
    dry_run.show_points([*enumerate(points.expand(config, [{}], tmp_path))])
    line = (
        "phases.pretrain trains 8 steps after its last checkpoint, and no measurement sees them: "
    )
    said = line + "set phases.pretrain.steps=12" in " ".join(capsys.readouterr().out.split())
    assert said == (last == 12)


WIDTHS = product(param("seed", range(8)), param("model.width", [8, 16]))
MISSING = "no flatness was measured"


@pytest.mark.parametrize(("probe", "num_projected"), [("", 0), ("_projected", 4)])
@pytest.mark.parametrize("shots", [0, 8, 16])
def test_the_declared_probe_and_shots_are_drawn(probe, num_projected, shots, tmp_path, capsys):
    config = tiny_config()
    config.probes.projected_dimension = num_projected
    config.claims.update({"probe": f"linear_probe{probe}", "shots": shots})
    text = shown(points.expand(config, WIDTHS, tmp_path), capsys)
    assert "no seed has the accuracy of every pair" not in text
    assert "No verdict on 'At equal excess loss the larger model is the more accurate'" not in text


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        (
            {"measures": ("fisher_trace", "gradient_noise")},
            ["fisher_trace", "fisher_trace@embedded", "fisher_trace@embedded_invariant"],
        ),
        (
            {"measures": ("fisher_trace",), "invariant": False},
            ["fisher_trace", "fisher_trace@embedded"],
        ),
        (
            {"measures": ("hessian_eigenvalues",)},
            [f"hessian_eigenvalue/largest_1{at}" for at in ("", "@embedded")],
        ),
        ({"measures": ("gradient_noise",)}, []),
    ],
)
def test_only_measured_columns_of_sharpness_are_drawn(settings, columns, tmp_path, capsys):
    config = tiny_config()
    config.flatness.update({"num_microbatches": 6} | settings)
    expanded = points.expand(config, WIDTHS, tmp_path)
    rows = draw_sweep(
        dry_run.synthetic_arms(expanded), PlantedTruth(), np.random.default_rng(0)
    ).rows
    found = [name for name in rows[0].values if name.startswith(("hessian", "fisher"))]
    assert [name for name in found if not name.endswith("_sem")] == columns
    assert (MISSING in shown(expanded, capsys)) == (not columns)


def test_languages_are_replicates_and_no_arms(tmp_path):
    """As `results_csv` reads them."""
    strength = param("phases.drift.flatness_penalty.strength", [0.0, 1e-4])
    sweep = product(param("language.seed", [0, 1]), param("seed", [0, 1]), strength)
    arms = dry_run.synthetic_arms(tiny_points(sweep, tmp_path))
    assert [[*arm.swept.values()] for arm in arms] == [["0.0"], ["0.0001"]]
    seeds = [f"{seed} of language {language}" for language in (0, 1) for seed in (0, 1)]
    assert arms[0].seeds == arms[1].seeds == seeds
    rows = draw_sweep(arms, PlantedTruth(), np.random.default_rng(0)).rows
    assert {row.seed: row.language for row in rows} == {name: name[-1] for name in seeds}


def test_the_full_dial_has_three_arms_of_sixteen_seeds(tmp_path):
    config, listed = loading.load(f"{ROOT}/configs/flatness_dial_sweep.py:full")
    arms = dry_run.synthetic_arms(points.expand(config, listed, tmp_path))
    assert len(arms) == 3
    assert all(len(arm.seeds) == 16 for arm in arms)
    rows = draw_sweep(arms, PlantedTruth(), np.random.default_rng(0)).rows
    claims = [verdict.claim for verdict in judge(compare(rows))]
    assert not any("larger model" in claim for claim in claims)


@pytest.mark.parametrize(
    ("primary", "tested"), [("accuracy", True), ("effect", True), ("label noise", False)]
)
def test_a_primary_claim_that_the_design_cannot_test_is_said(primary, tested, tmp_path, capsys):
    config = tiny_config()
    config.claims.primary = primary
    text = shown(points.expand(config, WIDTHS, tmp_path), capsys)
    line = f"This sweep has no claim of the declared primary kind, claims.primary='{primary}'."
    assert (line in text) == (not tested)


def test_doses_cannot_test_a_primary_claim_on_accuracy(tmp_path, capsys):
    doses = param("phases.drift.flatness_penalty.strength", [0.0, 1e-4])
    text = shown(tiny_points(product(param("seed", [0, 1]), doses), tmp_path), capsys)
    assert "no claim of the declared primary kind, claims.primary='accuracy'." in text


def test_power_grows_with_the_number_of_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "NUM_SWEEPS", 10)

    def shares(num_seeds: int):
        sweep = product(param("seed", range(num_seeds)), param("model.width", [8, 16]))
        found = power.predict_verdicts(
            dry_run.synthetic_arms(tiny_points(sweep, tmp_path)), UNDECLARED
        )
        return {one.kind: one.power for one in found if one.kind != "effect"}

    few, many = shares(2), shares(8)
    assert all(few[kind] < many[kind] for kind in few)
    assert min(many.values()) >= 0.9


def test_one_program_of_two_slots_is_still_listed(tmp_path, capsys):
    sweep = chain(param("seed", [0, 1]))
    config = tiny_config()
    config.training.together = 2
    expanded = points.expand(config, sweep, tmp_path)
    dry_run.show_points(list(enumerate(expanded)))
    assert "trained in one program of 2 slots: 0, 1" in capsys.readouterr().out


def rows_of(printed: str, first: str) -> list[list[str]]:
    """Return the cells of the rows of a table that begin with a word."""
    lines = (line.strip() for line in printed.splitlines())
    return [re.split(r"\s{2,}", line) for line in lines if line.startswith(first)]


@pytest.mark.slow
def test_every_language_has_its_figures(tmp_path, capsys):
    sweep = product(param("language.seed", [0, 1]), param("model.width", [8, 16]))
    dry_run.show_languages(points.expand(tiny_config(), sweep, tmp_path))
    *entropies, task_0, task_1 = rows_of(capsys.readouterr().out, "hmm, seed")
    assert [row[0] for row in entropies] == ["hmm, seed 0", "hmm, seed 1"]
    for _, *cells in entropies:
        optimum, unigram, context = (float(cell.split(" ± ")[0]) for cell in cells)
        assert 0 < optimum < unigram <= math.log(6)
        assert context == pytest.approx(unigram - optimum, abs=0.0015)
    assert [row[:2] for row in (task_0, task_1)] == [[f"hmm, seed {s}", "state_2"] for s in (0, 1)]
    assert task_0[-1] == "1.000 ± 0.000"


def test_a_language_of_a_teacher_says_that_it_has_no_figures(tmp_path, capsys):
    config = tiny_config()
    config.language.name = "generated"
    point = points.expand(tiny_config(), product(param("seed", [0])), tmp_path)[0]
    dry_run.show_languages([dataclasses.replace(point, config=FrozenConfigDict(config))])
    assert capsys.readouterr().out.count("generated, seed 0: no figures here") == 1


def test_the_drift_is_that_of_each_sgd_phase(tmp_path, capsys):
    rates = param("phases.drift.schedule.learning_rate", [0.1, 0.2])
    config = tiny_config()
    config.phases.drift.schedule.warmup_steps = 0
    dry_run.show_drift(points.expand(config, product(param("seed", [0, 1]), rates), tmp_path))
    printed = capsys.readouterr().out
    small, large = 0.1**2 * 6 / 8, 0.2**2 * 6 / 8
    assert rows_of(printed, "drift ") == [
        ["drift", "0.1", "8", "6", "sampled", f"{small:.2g}"],
        ["drift", "0.2", "8", "6", "sampled", f"{large:.2g}"],
    ]
    assert "No drift is predicted" not in printed  # AdamW has no t
    config.phases.drift.flatness_penalty.strength = 1e-4
    dry_run.show_drift(points.expand(config, product(param("seed", [0])), tmp_path / "penalty"))
    assert "No drift is predicted for drift: t is defined for SGD" in capsys.readouterr().out


def test_the_prediction_and_the_points_have_the_names_of_arms(tmp_path, capsys):
    rate = "phases.drift.schedule.learning_rate"
    arms = chain(arm("[slow]", {rate: 1e-3}), arm("usual", {}))
    expanded = points.expand(tiny_config(), product(param("seed", range(2)), arms), tmp_path)
    assert "usual is more accurate than [slow]" in shown(expanded, capsys)
    dry_run.show_points([*enumerate(expanded)][:1])
    assert f"0 [slow] ({expanded[0].name})" in " ".join(capsys.readouterr().out.split())
