"""Where the compiled calls of a run end: each end is a line of the curve."""

from itertools import pairwise

import pytest

from jaxflat import config as base_config
from jaxflat.runs import trajectory

SIZES = [(1, 0), (49, 500), (60, 7), (950, 500), (8000, 500)]


def config_of(steps_per_call: int, steps: int = 950, anneal_steps: int = 500):
    config = base_config.base()
    config.training.update({"steps_per_call": steps_per_call, "save_every": 4})
    chosen = {"steps": steps, "anneal_steps": anneal_steps, "checkpoint_steps": (steps,)}
    config.phases.pretrain.update(chosen)
    return config


@pytest.mark.parametrize("steps_per_call", [1, 10, 250, 10**6])
@pytest.mark.parametrize(("steps", "anneal_steps"), SIZES)
def test_the_curve_has_a_line_at_least_every_2_percent(steps_per_call, steps, anneal_steps):
    config = config_of(steps_per_call, steps, anneal_steps)
    (phase,) = trajectory.phases(config)
    ends = trajectory.call_ends(config, phase)
    anneal = trajectory.anneal_ends(config, phase, steps)
    assert (ends[-1], anneal[-1:]) == (steps, [steps + anneal_steps] * (anneal_steps > 0))
    for stops, length in (([0, *ends], steps), ([steps, *anneal], steps + anneal_steps)):
        gaps = [late - early for early, late in pairwise(stops)]
        assert not gaps or max(gaps) <= min(steps_per_call, max(0.02 * length, 1))
        assert not gaps or max(gaps) <= trajectory.longest_call(config, phase)


def test_longer_calls_save_no_more_recovery_checkpoints():
    for steps_per_call, expected in ((50, [200, 400, 600, 800, 950]), (250, [950])):
        config = config_of(steps_per_call)
        (phase,) = trajectory.phases(config)
        saved = trajectory.recovery_steps(config, phase)
        assert saved == expected
        assert set(saved) <= set(trajectory.call_ends(config, phase))


def test_phases_that_runs_share_end_their_calls_at_the_same_steps():
    config = config_of(250)
    (alone,) = trajectory.phases(config)
    config.phases.drift = base_config.phase()
    config.phase_order = ("pretrain", "drift")
    assert trajectory.call_ends(config, trajectory.phases(config)[0]) == trajectory.call_ends(
        config, alone
    )


@pytest.mark.parametrize(
    ("line", "position"),
    [
        ({"phase": "pretrain", "step": 950}, (950, False)),
        ({"phase": "pretrain", "step": 1000, "branch": 950}, (950, True)),
        ({"phase": "pretrain/projection", "step": 1500, "branch": 1450}, (950, True)),
    ],
)
def test_the_trunks_step_of_a_line(line, position):
    assert trajectory.curve_position(config_of(250), line) == position
