"""The optimizer sweep's points at every scale."""

from pathlib import Path

import pytest

from jaxflat.config import loading
from jaxflat.runs import trajectory
from jaxflat.sweeps import points

CONFIG = f"{Path(__file__).parents[2]}/configs/optimizer_sweep.py"


@pytest.mark.parametrize("scale", ["smoke", "laptop", "full", "paper"])
@pytest.mark.slow
def test_ways_on_share_their_start_and_leave_one_annealed_checkpoint(scale, tmp_path):
    config, listed = loading.load(f"{CONFIG}:{scale}")
    expanded = [p for p in points.expand(config, listed, tmp_path) if p.config.phase_order]
    assert len(expanded) % 5 == 0
    warm = {p.config.phases.warm for p in expanded}
    assert len(warm) == 1
    for point in expanded:
        phases, found = (
            trajectory.phases(point.config),
            trajectory.measured_checkpoints(point.config),
        )
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


@pytest.mark.slow
def test_the_adversary_is_trained_once_for_itself_and_for_what_follows_it(tmp_path):
    config, listed = loading.load(f"{CONFIG}:laptop")
    orders = [p.config.phase_order for p in points.expand(config, listed, tmp_path)]
    followed = orders.index(("warm", "adversary", "off"))
    assert followed < orders.index(("warm", "adversary"))
