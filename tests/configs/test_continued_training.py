"""The smallest scale of the continued-training sweep, from the command to its page."""

import csv
from pathlib import Path

import pytest

from jaxflat import main
from jaxflat.config import loading
from jaxflat.runs import trajectory
from jaxflat.sweeps import points

CONFIG = f"{Path(__file__).parents[2]}/configs/continued_training_sweep.py"
ARMS = ("exact targets", "label noise", "not continued")
SLOW = [pytest.param(scale, marks=pytest.mark.slow) for scale in ("full", "paper")]


@pytest.mark.parametrize("scale", ["smoke", "laptop", *SLOW])
def test_arms_differ_in_continued_training_alone_and_are_measured_while_they_settle(
    scale, tmp_path
):
    config, listed = loading.load(f"{CONFIG}:{scale}")
    expanded = points.expand(config, listed, tmp_path)
    for exact, noise, start in zip(*(expanded[i::3] for i in range(3)), strict=True):
        assert (exact.arm, noise.arm, start.arm) == ARMS
        assert exact.config.seed == noise.config.seed == start.config.seed
        changed = noise.config.to_dict()
        changed["phases"]["continue"]["targets"] = "exact"
        assert changed == exact.config.to_dict()
        assert start.config.phase_order == ("warm", "settle")
        ladder = config.phases.settle.checkpoint_steps
        for point in (exact, noise, start):
            settle = trajectory.phases(point.config)[-1]
            assert settle.settings.targets == "exact"
            found = trajectory.measured_checkpoints(point.config)
            anneal = settle.settings.anneal_steps
            assert [one.step for one in found] == [settle.start + s + anneal for s in ladder]


@pytest.mark.slow
def test_the_smoke_scale_runs_and_compares_the_arms(tmp_path, monkeypatch, capsys):
    assert main.main([f"--config={CONFIG}:smoke", f"--workdir={tmp_path}"]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2
    assert len(list((tmp_path / "trunks").iterdir())) == 2 * 3  # warm, and warm with each way on
    printed = " ".join(capsys.readouterr().out.split())
    for arm in ("label noise", "not continued"):
        assert f"At equal excess loss {arm} is flatter than exact targets (primary)" in printed
