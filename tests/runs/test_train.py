"""A trunk and its anneals: no anneal changes the trunk, and devices hold one training state."""

import gc

import jax
import numpy as np
import pytest

from jaxflat.console import Display
from jaxflat.runs import builders, recovery, run, slots, trajectory
from jaxflat.sweeps import points
from tests.support.sweeps import tiny_config

EMBEDDING = (9, 8)  # words and width of the model below: no other array of a state has this shape


def last_state(branches, workdir):
    """Train a run on four devices, with an anneal at each of `branches`; return its trunk."""
    config = tiny_config()
    config.phase_order = ("pretrain",)
    del config.phases.drift
    config.mesh.update({"data": 2, "model": 2})
    config.phases.pretrain.checkpoint_steps = branches
    projection = {"checkpoint_steps": branches[:1], "batch_size": 8, "steps": 4}
    config.phases.pretrain.projection.update(projection)
    (point,) = points.expand(config, [{}], workdir)
    assert point.folder.lease.is_available()
    with point.folder.lease.try_acquire():
        point.folder.make()
        run.train_points([point], Display(1), pytest.fail)
        return recovery.resume(point.config, point.folder, trajectory.phases(point.config))[0]


@pytest.mark.slow
def test_anneals_leave_the_trunk_as_it_is_and_devices_hold_one_state(tmp_path, monkeypatch):
    held, run_calls = [], slots.run_calls
    earlier = {id(array): array for array in jax.live_arrays()}  # kept alive: no id is used again

    def count_and_run(calls):
        gc.collect()
        new = [array for array in jax.live_arrays() if id(array) not in earlier]
        kinds = [array.sharding.memory_kind for array in new if array.shape == EMBEDDING]
        call = calls[0]
        held.append((call.kind, kinds.count("device"), kinds.count("pinned_host")))
        places = builders.state_shardings(builders.make_mesh(call.config), call.state)
        moved = jax.tree.map(
            lambda array, place: array.sharding.is_equivalent_to(place, array.ndim),
            (call.state.params, call.state.optimizer_state),
            (places.params, places.optimizer_state),
        )
        assert all(jax.tree.leaves(moved))
        return run_calls(calls)

    monkeypatch.setattr(slots, "run_calls", count_and_run)
    state = last_state((3, 6, 10), tmp_path / "branches")
    kinds = ("trunk", 3, 0), ("anneal", 3, 3), ("projection", 3, 6)
    assert set(held) == set(kinds)  # three arrays: parameters and AdamW's two moments
    alone = last_state((10,), tmp_path / "alone")
    assert state.step == 10
    jax.tree.map(np.testing.assert_array_equal, state, alone)
