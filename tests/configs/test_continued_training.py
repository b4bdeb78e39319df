"""The smallest scale of the continued-training sweep, from the command to its page."""

import csv
from pathlib import Path

import pytest

from jaxflat import main
from jaxflat.analysis.label_noise import CLAIM
from jaxflat.config import loading
from jaxflat.runs import trajectory
from jaxflat.sweeps import points

CONFIG = f"{Path(__file__).parents[2]}/configs/continued_training_sweep.py"


@pytest.mark.parametrize("scale", ["smoke", "laptop", "full", "paper"])
def test_arms_differ_in_their_targets_alone_and_end_projected(scale, tmp_path):
    config, listed = loading.load(f"{CONFIG}:{scale}")
    expanded = points.expand(config, listed, tmp_path)
    for sampled, exact in zip(expanded[::2], expanded[1::2], strict=True):
        assert sampled.config.seed == exact.config.seed
        changed = sampled.config.to_dict()
        changed["phases"]["continue"]["targets"] = "exact"
        assert changed == exact.config.to_dict()
    warm, on = trajectory.phases(expanded[0].config)
    found = trajectory.measured_checkpoints(expanded[0].config)
    assert [s.step for s in found if s.projected] == [warm.stop, on.stop]
    assert (found[0].step, found[-1].step) == (warm.stop, on.stop)


@pytest.mark.slow
def test_the_smoke_scale_runs_and_compares_the_arms(tmp_path, monkeypatch, capsys):
    assert main.main([f"--config={CONFIG}:smoke", f"--workdir={tmp_path}"]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5
    for seed in ("0", "1"):  # the start is the same in both arms
        starts = [r for r in rows if r["seed"] == seed and r["step"] == "60"]
        values = {(r["projected"], r["excess_loss"], r["hessian_trace"]) for r in starts}
        assert len(starts) == 2 * len(values) == 4
    assert len(list((tmp_path / "trunks").iterdir())) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert CLAIM in printed
    assert "Changes from the first checkpoint" in (tmp_path / "report.html").read_text()
