"""The optimizer sweep's points at every scale, and its smallest scale from command to page."""

import csv
from pathlib import Path

import pytest

from jaxflat import loading, main, points, preemption, trajectory

CONFIG = f"{Path(__file__).parents[1]}/configs/optimizer_sweep.py"


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_ways_on_share_their_start_and_leave_one_annealed_checkpoint(scale, tmp_path):
    config, listed = loading.load(f"{CONFIG}:{scale}")
    expanded = [p for p in points.expand(config, listed, tmp_path) if p.config.phase_order]
    assert len(expanded) % 5 == 0
    warm = {p.config.phases.warm for p in expanded}
    assert len(warm) == 1
    for point in expanded:
        phases, found = trajectory.phases(point.config), trajectory.snapshots(point.config)
        assert phases[0].name == "warm"
        last = phases[-1]
        assert found[-1].step == last.stop + last.settings.anneal_steps
        assert len(found) == len(phases) - 1
    adversaries = {
        name: p.config.phases[name].adversary.strength
        for p in expanded
        for name in p.config.phase_order
    }
    assert {name for name, strength in adversaries.items() if strength} == {"adversary"}


def test_the_adversary_is_trained_once_for_itself_and_for_what_follows_it(tmp_path):
    config, listed = loading.load(f"{CONFIG}:laptop")
    orders = [p.config.phase_order for p in points.expand(config, listed, tmp_path)]
    followed = orders.index(("warm", "adversary", "off"))
    assert followed < orders.index(("warm", "adversary"))


@pytest.mark.slow
def test_the_smoke_scale_runs_and_compares_the_algorithms(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preemption, "install", lambda: None)
    assert main.main([f"--config={CONFIG}:smoke", f"--workdir={tmp_path}"]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (5 + 1 + 1 + 2)  # the adversary's checkpoint is in two points
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 ways of training set against adamw" in printed
    page = (tmp_path / "report.html").read_text()
    for text in ("adversary → off", "lookup table log p", "untrained", "muon", "sam"):
        assert text in page
