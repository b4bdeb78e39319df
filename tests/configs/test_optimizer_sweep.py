"""The optimizer sweep's points at every scale."""

from pathlib import Path

import pytest

from jaxflat.config import loading
from jaxflat.runs import trajectory
from jaxflat.sweeps import points

CONFIG = f"{Path(__file__).parents[2]}/configs/optimizer_sweep.py"


@pytest.mark.parametrize("scale", ["smoke", "laptop", "full", "paper"])
@pytest.mark.slow
def test_arms_share_their_start_and_are_measured_in_their_last_phase_only(scale, tmp_path):
    config, listed = loading.load(f"{CONFIG}:{scale}")
    expanded = [p for p in points.expand(config, listed, tmp_path) if p.config.phase_order]
    assert len(expanded) % 5 == 0
    assert len({p.config.phases.warm for p in expanded}) == 1
    for point in expanded:
        phases = trajectory.phases(point.config)
        found = trajectory.measured_checkpoints(point.config)
        assert phases[0].name == "warm"
        last = phases[-1]
        assert all(last.start < checkpoint.step for checkpoint in found)
        assert found[-1].step == last.stop + last.settings.anneal_steps
        assert len(found) == len(last.settings.checkpoint_steps) >= 1 + (scale != "smoke")
    with_adversary = {
        name
        for p in expanded
        for name in p.config.phase_order
        if p.config.phases[name].adversary.strength
    }
    assert with_adversary == {"adversary"}
