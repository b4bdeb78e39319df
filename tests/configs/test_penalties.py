"""The sweeps of penalties: their points at every scale, and smoke from the command to the page."""

import csv
from pathlib import Path

import pytest

from jaxflat import main
from jaxflat.config import loading
from jaxflat.sweeps import points
from tests.support.counts import in_full

CONFIGS = Path(__file__).parents[2] / "configs"
PENALTY = "phases.dial.flatness_penalty"
SLOW = [pytest.param(scale, marks=pytest.mark.slow) for scale in ("full", "paper")]


def loaded(name, scale):
    return loading.load(f"{CONFIGS}/{name}.py:{scale}")


@pytest.mark.parametrize("name", ["flatness_dial_sweep", "penalty_sweep"])
@pytest.mark.parametrize("scale", ["smoke", "laptop", *SLOW])
def test_the_arms_of_a_seed_differ_in_the_penalty_alone(name, scale, tmp_path):
    config, listed = loaded(name, scale)
    expanded = points.expand(config, listed, tmp_path)
    assert len({point.name for point in expanded}) == len(listed)
    assert listed[0][f"{PENALTY}.strength"] == 0  # the baseline
    by_seed = {}
    for point in expanded:
        changed = point.config.to_dict()
        del changed["phases"]["dial"]["flatness_penalty"]
        by_seed.setdefault(point.config.seed, []).append(str(changed))
    arms = list(by_seed.values())
    assert {len(same) for same in arms} == {len(arms[0])}
    assert all(len(set(same)) == 1 for same in arms)


@pytest.mark.parametrize("scale", ["laptop", "full", "paper"])
def test_doses_have_both_signs(scale):
    _, listed = loaded("flatness_dial_sweep", scale)
    doses = {point[f"{PENALTY}.strength"] for point in listed}
    assert min(doses) < 0 < max(doses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arms"), [("flatness_dial_sweep", 2), *in_full(("penalty_sweep", 7))]
)
def test_the_smoke_scale_runs_and_shares_the_warm_start(tmp_path, name, arms):
    assert main.main([f"--config={CONFIGS}/{name}.py:smoke", f"--workdir={tmp_path}"]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * arms  # seeds and checkpoints
    assert len({row["point"] for row in rows}) == 2 * arms
    assert all(float(row["hessian_trace@invariant"]) > 0 for row in rows)
    assert len(list((tmp_path / "trunks").iterdir())) == 2
