"""The factorial sweep's points at every scale, and its smoke scale from the command to the page."""

import csv
from itertools import product
from pathlib import Path

import pytest

from jaxflat import main
from jaxflat.config import loading
from jaxflat.sweeps import points
from tests.support.counts import FULL

CONFIG = f"{Path(__file__).parents[2]}/configs/factorial_sweep.py"
DRIFT = "phases.drift"
FACTORS = (
    *("model.width", f"{DRIFT}.schedule.learning_rate"),
    *(f"{DRIFT}.batch_size", f"{DRIFT}.targets"),
)


MANY = [pytest.param(scale, marks=pytest.mark.slow) for scale in ("full", "paper")]


@pytest.mark.parametrize("scale", ["smoke", "laptop", *MANY])
def test_every_seed_has_every_combination_and_shares_its_warm_start(scale, tmp_path):
    config, listed = loading.load(f"{CONFIG}:{scale}")
    levels = [dict.fromkeys(point[key] for point in listed) for key in FACTORS]
    assert [len(one) for one in levels] == [2] * 4
    seeds = dict.fromkeys(point["seed"] for point in listed)
    languages = {point.get("language.seed") for point in listed}
    assert languages == ({None} if scale == "smoke" else {0, 1})
    for seed in seeds:
        own = [tuple(p[key] for key in FACTORS) for p in listed if p["seed"] == seed]
        assert sorted(own) == sorted(product(*levels))
    expanded = points.expand(config, listed, tmp_path)
    assert len({point.name for point in expanded}) == len(listed) == 16 * len(seeds)
    assert len({point.config.phases.warm for point in expanded}) == 1
    assert len({point.config.phases.settle for point in expanded}) == 1


@pytest.mark.skipif(not FULL, reason="minutes of compilation: in make full")
@pytest.mark.slow
def test_the_smoke_scale_runs_and_the_page_has_the_effect_of_each_factor(tmp_path):
    assert main.main([f"--config={CONFIG}:smoke", f"--workdir={tmp_path}"]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 * 2
    page = (tmp_path / "report.html").read_text()
    for factor in ("width 8 → 16", "batch_size 16 → 64", "targets exact → sampled"):
        assert page.count(factor) > 2
