"""The flatness dial's points at every scale, and its smoke scale from the command to the page."""

import csv
from pathlib import Path

import pytest

from jaxflat import main
from jaxflat.config import loading
from jaxflat.sweeps import points

CONFIG = f"{Path(__file__).parents[2]}/configs/flatness_dial_sweep.py"
DOSE = "phases.dial.flatness_penalty.strength"


@pytest.mark.parametrize("scale", ["smoke", "laptop", "full", "paper"])
def test_doses_differ_in_the_strength_alone_and_the_first_is_0(scale, tmp_path):
    config, listed = loading.load(f"{CONFIG}:{scale}")
    doses = list(dict.fromkeys(point[DOSE] for point in listed))
    assert doses[0] == 0
    assert max(doses) > 0
    assert scale == "smoke" or min(doses) < 0
    expanded = points.expand(config, listed, tmp_path)
    assert len({point.name for point in expanded}) == len(listed)
    for first in range(0, len(listed), len(doses)):
        same = set()
        for point in expanded[first : first + len(doses)]:
            changed = point.config.to_dict()
            changed["phases"]["dial"]["flatness_penalty"]["strength"] = 0.0
            same.add(str(changed))
        assert len(same) == 1


@pytest.mark.slow
def test_the_smoke_scale_runs_and_shares_the_warm_start(tmp_path):
    assert main.main([f"--config={CONFIG}:smoke", f"--workdir={tmp_path}"]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    assert {float(row[DOSE]) for row in rows} == {0.0, 1e-4}
    assert all(float(row["hessian_trace@invariant"]) > 0 for row in rows)
    assert len(list((tmp_path / "trunks").iterdir())) == 2
